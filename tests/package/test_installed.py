"""The files of `make dist` as users install them, in environments that hold nothing else: `make test-package`.

pip fetches what the package depends on, which takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = "hqq_oft/ops/native/hqq_oft_native.so"
# Variables that would make this folder's package or other kernels run.
UNSET = ("PYTHONPATH", "TRITON_INTERPRET")
# pip reads one or the other for isolated builds, by its version.
PINNED = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(ROOT / "constraints.txt"))
README = r"""
import pathlib, re, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
names = {}
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
pathlib.Path("path/to").mkdir(parents=True)
LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).to(torch.bfloat16).save_pretrained("path/to/model")
for example in re.findall(r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), re.DOTALL):
    exec(example, names)
"""


def finish(*command, cwd, **variables):
    """The result of a command, in this environment without what belongs to the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=environment | PINNED | variables, capture_output=True, text=True)


def run(*command, cwd, **variables):
    """Output of a command, which must succeed."""
    done = finish(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sdist():
    (path,) = (ROOT / "dist").glob("hqq_oft-*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel():
    (path,) = (ROOT / "dist").glob("hqq_oft-*.whl")
    return path


@pytest.fixture(scope="session", params=["sdist", "wheel"])
def installed(request, tmp_path_factory):
    """The programs of a new environment with the package, from one of the files, and what it depends on."""
    file, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp(request.param) / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, f"hqq-oft @ {file.as_uri()}", cwd=folder.parent, HQQ_OFT_BUILD="cpu")
    return folder / "bin"


def test_an_old_setuptools_is_refused_with_what_to_do(sdist, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip"]
    run(*pip, "install", "--quiet", "setuptools==65.5.0", cwd=tmp_path, PIP_CONSTRAINT="")
    done = finish(*pip, "install", "--no-build-isolation", "--no-deps", sdist, cwd=tmp_path)
    assert done.returncode != 0
    assert "setuptools 77 or later, and this environment has 65.5.0: run `pip install -U setuptools`" in done.stderr


def test_the_wheel_is_for_every_python_and_many_linuxes_and_holds_no_library_of_torch(wheel, tmp_path):
    assert re.fullmatch(r"hqq_oft-[\d.]+-cp310-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extract(NATIVE, tmp_path)
    assert [name for name in names if ".so" in name] == [NATIVE]
    undefined = run("nm", "-D", "--undefined-only", tmp_path / NATIVE, cwd=tmp_path).split()
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []


def test_the_examples_and_the_commands_of_the_readme(installed, tmp_path):
    run(installed / "python", "-c", README, ROOT / "README.md", cwd=tmp_path)
    (tmp_path / "commands").mkdir()
    for name in ("path", "adapter"):
        (tmp_path / "commands" / name).symlink_to(tmp_path / name)
    commands = re.findall(r"^hqq-oft .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in commands} == {"quantize", "merge", "env", "check"}
    path = os.pathsep.join([str(installed), os.environ["PATH"]])
    said = [
        run("sh", "-c", command, cwd=tmp_path / "commands", PATH=path)
        for command in commands
        if not command.startswith("hqq-oft check")  # minutes
    ]
    assert (tmp_path / "commands" / "merged" / "config.json").exists()
    assert f"\nrunning from the installation in {installed.parent}/lib/" in said[-1]
    assert re.search(r"^linear +native", said[-1], re.MULTILINE)
