"""Runs the examples of the README unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import HQQLinear
from transformers import LlamaConfig, LlamaForCausalLM

import hqq_oft

ROOT = Path(__file__).parents[2]
EXAMPLES = ("quick-start", "from-lora", "serving", "merging")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in EXAMPLES)])
def test_the_examples_run(page, tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert examples
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    try:
        for example in examples:  # those of one page follow one another
            exec(example.replace("path/to/model", str(tmp_path / "model")), names)
    finally:
        hqq_oft.unpatch_peft()
    if "merged" in names:
        assert isinstance(names["merged"].model.layers[0].self_attn.q_proj, HQQLinear)


def documents():
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "page", [*documents(), "README.md", "CONTRIBUTING.md", "ENVS.md", "CHANGELOG.md", "bench/results/README.md"]
)
def test_links_and_commands_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z0-9.-]+)", text)) <= targets
