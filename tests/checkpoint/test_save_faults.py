"""Saves are atomic: after a kill, interrupt, full disk or denied access, a directory is complete or unchanged."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_llama import VOCABULARY, small_llama

from hqq_oft import load_quantized, quantize_model, save_quantized
from hqq_oft.checkpoint import files as checkpoint
from hqq_oft.checkpoint.atomic_directory import staged_directory

TOKENS = torch.arange(6)[None] % VOCABULARY


@pytest.fixture(scope="module")
def model():
    made = small_llama()
    quantize_model(made, group_size=16, progress=False)
    return made


@pytest.fixture(scope="module")
def other():
    made = small_llama(seed=1)
    quantize_model(made, group_size=16, progress=False)
    return made


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- Killed ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from small_llama import small_llama
import hqq_oft
from hqq_oft.checkpoint import files as checkpoint

model = small_llama(seed=1)
hqq_oft.quantize_model(model, group_size=16, progress=False)
original, count = getattr(checkpoint, sys.argv[3]), []

def stalling(*args, **kwargs):
    count.append(args)
    if len(count) == int(sys.argv[4]):
        print("stalled", flush=True)
        time.sleep(600)
    return original(*args, **kwargs)

setattr(checkpoint, sys.argv[3], stalling)
hqq_oft.save_quantized(model, sys.argv[1], max_shard_size="8KB", overwrite=True)
"""


def kill_while_saving(target, function, nth):
    """Let another process save a model there, and kill it when it calls that function for the nth time."""
    command = [sys.executable, "-c", KILLED, str(target), str(Path(__file__).parents[1]), function, str(nth)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stalled\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("function", "nth"), [("save_file", 3), ("_write_json", 2)])
def test_a_killed_save_never_leaves_a_loadable_partial_model(tmp_path, model, function, nth):
    save_quantized(model, tmp_path / "old")
    before = contents(tmp_path / "old")
    kill_while_saving(tmp_path / "old", function, nth)
    assert contents(tmp_path / "old") == before
    (left,) = (path for path in tmp_path.iterdir() if path.name != "old")
    assert left.name.startswith(".old.partial-")
    assert any(left.glob("*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"contains no config\.json"):
        load_quantized(left)
    save_quantized(model, tmp_path / "old", overwrite=True)  # leftovers of the killed save do not block the next one


# --- Out of room, forbidden, interrupted -----------------------------------------------------------------------------


def fail_in_write(monkeypatch, error):
    def failing(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", failing)


def fail_in_mkdir(monkeypatch, error):
    def failing(path, *args, **kwargs):
        raise error

    monkeypatch.setattr(Path, "mkdir", failing)


def fail_in_fsync(monkeypatch, error):
    def failing(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", failing)


def fail_in_rename(monkeypatch, error):
    original = Path.rename

    def failing(path, target):
        if ".partial-" in path.name:
            raise error
        return original(path, target)

    monkeypatch.setattr(Path, "rename", failing)


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    KeyboardInterrupt(),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")))
@pytest.mark.parametrize("fault", [fail_in_write, fail_in_mkdir, fail_in_fsync, fail_in_rename])
@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch, model, other, error, fault, there):
    target = tmp_path / "model"
    if there:
        save_quantized(other, target)
    before = contents(target) if there else None
    with monkeypatch.context() as patch:
        fault(patch, error)
        with pytest.raises(type(error)) as raised:
            save_quantized(model, target, overwrite=True)
    if isinstance(error, OSError):
        assert raised.value.errno == error.errno
        assert f"{error.strerror}: writing {target}; nothing was changed" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])
    assert not there or contents(target) == before
    save_quantized(model, target, overwrite=True)
    assert torch.equal(load_quantized(target)(TOKENS).logits, model(TOKENS).logits)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_to_a_full_disk_changes_nothing(tmp_path, model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the error of writing is EFBIG instead of ENOSPC
        with pytest.raises(OSError, match=r"File too large: writing .*model; nothing was changed") as raised:
            save_quantized(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


# --- What is there already -------------------------------------------------------------------------------------------


def test_only_a_saved_model_is_overwritten_and_only_on_request(tmp_path, model):
    for name, make, overwrite, message in [
        ("model", lambda path: save_quantized(model, path), False, "model exists; choose another name, or replace it"),
        (
            "mine",
            lambda path: (path.mkdir(), (path / "thesis.txt").write_text("all")),
            True,
            "contains no config.json; only",
        ),
        ("file", lambda path: path.write_text("all"), True, "file exists and is not a directory"),
        ("link", lambda path: path.symlink_to(tmp_path / "file"), True, "file exists and is not a directory"),
    ]:
        make(tmp_path / name)
        with pytest.raises(FileExistsError, match=message):
            save_quantized(model, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "all"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "mine", "file", "link"}


def test_saving_fills_an_empty_directory_creates_parents_and_follows_links(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_quantized(model, tmp_path / "link")
    save_quantized(model, tmp_path / "a" / "b" / "model")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "model")


def test_overwriting_leaves_nothing_of_the_old_model(tmp_path, model, other):
    save_quantized(other, tmp_path / "model", max_shard_size="8KB")
    save_quantized(model, tmp_path / "model", overwrite=True)
    assert not list((tmp_path / "model").glob("*-of-*"))
    assert torch.equal(load_quantized(tmp_path / "model")(TOKENS).logits, model(TOKENS).logits)


def test_extra_files_are_part_of_the_atomic_save(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_quantized(model, tmp_path / "model", extra_files=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError, match="; nothing was changed"):
        save_quantized(model, tmp_path / "other", extra_files=[tmp_path / "lost.json"])
    assert not (tmp_path / "other").exists()


def test_of_two_concurrent_saves_to_one_directory_the_first_wins(tmp_path):
    def make(text, meanwhile=lambda: None):
        with staged_directory(tmp_path / "model") as staging:
            (staging / "config.json").write_text(text)
            meanwhile()

    with pytest.raises(OSError, match="; nothing was changed"):
        make("second", meanwhile=lambda: make("first"))
    assert contents(tmp_path / "model") == {"config.json": b"first"}
    assert len(list(tmp_path.iterdir())) == 1
