"""The command `hqq-oft`: its output files, messages and exit status."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize
from hqq.core.quantize import HQQLinear
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from small_llama import VOCABULARY, small_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hqq_oft
from hqq_oft import cli, cli_inputs, load_quantized
from hqq_oft.checkpoint import convert
from hqq_oft.quant import quantizer

TOKENS = torch.arange(6)[None] % VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model with a tokenizer's file, a quantized one, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    small_llama().save_pretrained(root / "dense")
    (root / "dense" / "tokenizer.json").write_text("{}")
    (root / "dense" / "pytorch_model.bin").write_text("not to be copied")
    assert cli.main(["quantize", str(root / "dense"), str(root / "four"), "--group-size", "16", "--quiet"]) == 0
    with hqq_oft.patch_peft():
        config = OFTConfig(r=0, oft_block_size=8, target_modules=r".*_proj")
        adapted = get_peft_model(load_quantized(root / "four"), config)
        randomize(adapted, 0.1)
        adapted.save_pretrained(root / "adapter")
    get_peft_model(small_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(root / "lora")
    missing = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight")
    state = {name: value for name, value in small_llama().state_dict().items() if name not in missing}
    small_llama().save_pretrained(root / "incomplete", state_dict=state)
    return root


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_quantize(folder, tmp_path, capsys):
    arguments = ["--group-size", "16", "--nbits", "3", "--axis", "0", "--dtype", "bfloat16", "--max-shard-size", "8KB"]
    arguments += [
        "--override",
        "down_proj=nbits:8,axis:1",
        "--override",
        "model.layers.1.*=dense",
        "--override",
        "lm_head=nbits:3",
    ]
    assert cli.main(["quantize", str(folder / "dense"), str(tmp_path / "out"), *arguments]) == 0
    model = load_quantized(tmp_path / "out")
    layers = {name: module.meta for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    assert len(layers) == 8
    assert (layers["lm_head"]["nbits"], layers["lm_head"]["axis"]) == (3, 0)
    assert (layers["model.layers.0.mlp.down_proj"]["nbits"], layers["model.layers.0.mlp.down_proj"]["axis"]) == (8, 1)
    assert logits(model).dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    said = capsys.readouterr().out
    assert "8 layer(s) quantized, 7 kept" in said
    assert f"written to {tmp_path / 'out'}" in said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc has the sizes")
def test_the_dense_weights_stay_in_their_files_until_their_layer_is_quantized(tmp_path, monkeypatch):
    def allocated():
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    sizes, quantize = [], quantizer.quantize
    monkeypatch.setattr(quantizer, "quantize", lambda *a, **k: sizes.append(allocated()) or quantize(*a, **k))
    config = LlamaConfig(vocab_size=8, hidden_size=1024, intermediate_size=3072, num_hidden_layers=3)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "dense")
    del model
    gc.collect()
    before = allocated()
    arguments = ["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--dtype", "float32", "--quiet"]
    assert cli.main(arguments) == 0
    assert len(sizes) == 21
    assert max(sizes) - before < dense / 3  # the packed model has a sixth


@pytest.mark.parametrize("into", [None, "8", "dense"])
def test_merge(folder, tmp_path, capsys, into):
    out = tmp_path / "out"
    arguments = [str(folder / "four"), str(folder / "adapter"), str(out), *(["--into", into] if into else [])]
    assert cli.main(["merge", *arguments, "--report"]) == 0
    said = capsys.readouterr().out
    assert "keep it unmerged" in said
    assert "14 layer(s) merged, worst weight error" in said
    assert (out / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(out) if into == "dense" else load_quantized(out)
    with hqq_oft.patch_peft():
        adapted = PeftModel.from_pretrained(load_quantized(folder / "four"), folder / "adapter")
        expected = adapted.merge_and_unload(into={"8": 8}.get(into, into))
    assert torch.equal(logits(merged), logits(expected))


def test_the_solver_is_that_of_the_package(folder, tmp_path):
    out, merged = tmp_path / "out", tmp_path / "merged"
    options = ["--solver", "search", "--quiet"]
    assert cli.main(["quantize", str(folder / "dense"), str(out), "--group-size", "16", *options]) == 0
    expected = small_llama()
    hqq_oft.quantize_model(expected, group_size=16, solver="search", progress=False)
    assert torch.equal(logits(load_quantized(out)), logits(expected))
    assert cli.main(["merge", str(out), str(folder / "adapter"), str(merged), *options]) == 0
    with hqq_oft.patch_peft():
        adapted = PeftModel.from_pretrained(load_quantized(out), folder / "adapter")
        assert torch.equal(logits(load_quantized(merged)), logits(adapted.merge_and_unload(solver="search")))


def test_env(capsys):
    assert cli.main(["env"]) == 0
    assert "HQQ_OFT_BACKEND=" in capsys.readouterr().out


FAILURES = {
    "no model": (["quantize", "{tmp}/lost", "{tmp}/out"], "lost contains no config.json: give the directory of a"),
    "a model that is quantized": (["quantize", "{folder}/four", "{tmp}/out"], "four is already quantized"),
    "onto itself": (["quantize", "{folder}/dense", "{folder}/dense", "--force"], "choose another directory for the"),
    "into itself": (["quantize", "{folder}/dense", "{folder}/dense/q"], "choose another directory for the result"),
    "onto a model": (
        ["quantize", "{folder}/dense", "{folder}/four"],
        "four exists; choose another name, or",
    ),
    "onto other things": (["quantize", "{folder}/dense", "{folder}", "--force"], "contains no config.json; only"),
    "a group that does not fit": (
        ["quantize", "{folder}/dense", "{tmp}/out", "--group-size", "4096"],
        "does not divide",
    ),
    "an override of nothing": (
        ["quantize", "{folder}/dense", "{tmp}/out", "--group-size", "16", "--override", "no=dense"],
        "overrides match no linear layer of the model: ['no']",
    ),
    "a shard size that is none": (
        ["quantize", "{folder}/dense", "{tmp}/out", "--group-size", "16", "--max-shard-size", "big"],
        "a size must be a number of bytes or like",
    ),
    "a device that is none": (["quantize", "{folder}/dense", "{tmp}/out", "--device", "nowhere"], "nowhere"),
    "a dense model to merge into": (["merge", "{folder}/dense", "{folder}/adapter", "{tmp}/out"], "the model is dense"),
    "a dense model to convert": (["convert", "{folder}/dense", "{tmp}/out"], "the model has no HQQ layer"),
    "a lost model to convert": (["convert", "{folder}/lost", "{tmp}/out"], "lost contains no config.json: give the"),
    "a LoRA adapter": (["merge", "{folder}/four", "{folder}/lora", "{tmp}/out"], "lora holds a LORA adapter; only OFT"),
    "missing weights": (
        ["quantize", "{folder}/incomplete", "{tmp}/out", "--group-size", "16"],
        "lacks weights of LlamaForCausalLM: model.layers.0.mlp.up_proj.weight, model.layers.1.input_layernorm.weight.",
    ),
    "no adapter": (["merge", "{folder}/four", "{folder}/four", "{tmp}/out"], "contains no adapter_config.json: give"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_prints_the_reason_to_stderr_exits_with_1_and_writes_nothing(folder, tmp_path, capsys, case):
    arguments, message = FAILURES[case]
    before = sorted(folder.rglob("*"))
    assert cli.main([argument.format(folder=folder, tmp=tmp_path) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("hqq-oft: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert sorted(folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_model_and_traceback_prints_the_traceback(folder, tmp_path):
    out = str(tmp_path / "out")
    for bits in ("2", "8"):
        arguments = ["--nbits", bits, "--group-size", "16", "--force", "--quiet"]
        assert cli.main(["quantize", str(folder / "dense"), out, *arguments]) == 0
    assert load_quantized(out).model.layers[0].mlp.up_proj.meta["nbits"] == 8
    with pytest.raises(cli.CommandError, match="replace it"):
        cli.main(["quantize", str(folder / "dense"), out, "--traceback"])


def test_an_interrupt_exits_with_130_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(hqq_oft, "quantize_model", interrupted)
    assert cli.main(["quantize", str(folder / "dense"), str(tmp_path / "out")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- Before a model is loaded ----------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """Models can't be loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(hqq_oft, "load_quantized", loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "12"], "group_size must be a positive multiple of 8"),
        (["--group-size", "4096"], "does not divide"),
        (["--group-size", "16", "--override", "q_proj=group_size:4096"], "q_proj: group_size=4096 does not divide the"),
        (["--group-size", "16", "--override", "q_proj=nbits:7"], "overrides['q_proj']: nbits must be one of"),
        (["--group-size", "16", "--skip", "no_proj"], "skip_modules match no module of the model: ['no_proj']"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(folder, tmp_path, capsys, unloaded, arguments, message):
    assert cli.main(["quantize", str(folder / "dense"), str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that finds no GPU")
@pytest.mark.parametrize("arguments", [["quantize", "dense"], ["merge", "four", "adapter"]], ids=["quantize", "merge"])
def test_a_device_that_torch_cannot_use_is_an_error_of_one_line(folder, tmp_path, capsys, unloaded, arguments):
    command, *inputs = arguments
    paths = [str(folder / name) for name in inputs]
    assert cli.main([command, *paths, str(tmp_path / "out"), "--device", "cuda"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hqq-oft: --device cuda can't be used here (")
    assert line.endswith("see `hqq-oft env` for the devices.")


# --- The Hugging Face hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The models and the adapter in huggingface_hub's cache, as repositories of `owner`, without a network."""
    for name in ("dense", "four", "adapter"):
        repository = tmp_path / "cache" / f"models--owner--{name}"
        shutil.copytree(folder / name, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
    asked = {}

    def download(name, **patterns):
        asked[name] = patterns
        return snapshot_download(name, cache_dir=tmp_path / "cache", local_files_only=True, **patterns)

    monkeypatch.setattr(cli_inputs, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_models_and_adapters_are_named_as_on_the_hub(hub, folder, tmp_path):
    assert cli.main(["quantize", "owner/dense", "four", "--group-size", "16", "--quiet"]) == 0
    assert torch.equal(logits(load_quantized("four")), logits(load_quantized(folder / "four")))
    assert (tmp_path / "four" / "tokenizer.json").exists()
    assert cli.main(["merge", "owner/four", "owner/adapter", "merged", "--quiet"]) == 0
    assert cli.main(["merge", str(folder / "four"), str(folder / "adapter"), "expected", "--quiet"]) == 0
    assert torch.equal(logits(load_quantized("merged")), logits(load_quantized("expected")))
    assert set(hub) == {"owner/dense", "owner/four", "owner/adapter"}
    for patterns in hub.values():  # neither pickled weights nor those in another format
        repository = ["config.json", "model.safetensors", "merges.txt"]
        others = ["pytorch_model.bin", "qmodel.pt", "onnx/model.safetensors"]
        assert list(filter_repo_objects([*repository, *others], **patterns)) == repository


def test_a_model_to_convert_is_named_as_on_the_hub(hub, folder):
    assert cli.main(["convert", "owner/four", "converted", "--quiet"]) == 0
    assert torch.equal(logits(load_quantized("converted")), logits(load_quantized(folder / "four")))
    repository = ["config.json", "qmodel.pt", "pytorch_model.bin"]
    assert list(filter_repo_objects(repository, **hub["owner/four"])) == ["config.json", "qmodel.pt"]


def test_tensors_that_a_conversion_leaves_out_are_named_even_if_quiet(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "convert_checkpoint", lambda *arguments: ["model.extra.weight"])
    assert cli.main(["convert", str(folder / "four"), str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "hqq-oft: left out model.extra.weight: the model has no such tensor\n"
    assert captured.out == ""


def test_a_directory_comes_before_the_hub(hub, folder, tmp_path):
    shutil.copytree(folder / "dense", tmp_path / "owner" / "dense")
    assert cli.main(["quantize", "owner/dense", "four", "--group-size", "16", "--quiet"]) == 0
    assert hub == {}


def test_a_name_that_the_hub_does_not_provide_is_an_error_of_one_line(hub, tmp_path, capsys):
    assert cli.main(["quantize", "owner/lost", "four"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hqq-oft: owner/lost is not a directory, and the Hugging Face hub does not provide it: ")
    assert not (tmp_path / "four").exists()


# --- Usage -----------------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"hqq-oft {hqq_oft.__version__}\n"


def test_quiet_commands_print_nothing(tmp_path, capfd):
    config = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **config)).save_pretrained(tmp_path / "dense")
    paths = [str(tmp_path / name) for name in ("dense", "four", "adapter", "merged")]
    bars = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    capfd.readouterr()
    assert cli.main(["quantize", *paths[:2], "--group-size", "16", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    with hqq_oft.patch_peft():
        config = OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"])
        get_peft_model(load_quantized(paths[1]), config).save_pretrained(paths[2])
    capfd.readouterr()
    for into in ("4", "dense"):
        assert cli.main(["merge", *paths[1:], "--into", into, "--force", "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == bars
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lost"],
        ["quantize"],
        ["quantize", "a"],
        ["quantize", "a", "b", "--nbits", "7"],
        ["quantize", "a", "b", "--nbits", "many"],
        ["quantize", "a", "b", "--axis", "2"],
        ["quantize", "a", "b", "--group-size", "0"],
        ["quantize", "a", "b", "--override", "q_proj"],
        ["quantize", "a", "b", "--override", "q_proj=8"],
        ["quantize", "a", "b", "--solver", "best"],
        ["merge", "a", "b"],
        ["merge", "a", "b", "c", "--into", "thin"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: hqq-oft" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "merge", "convert", "env", "check"])
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    examples = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  hqq-oft ")]
    assert examples
    for example in examples:
        cli._parser().parse_args(example.replace("'", "").split()[1:])


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "hqq_oft.cli", "quantize", "lost", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("hqq-oft: lost contains no config.json")
