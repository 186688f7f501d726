"""Which parts are built, by `HQQ_OFT_BUILD` and the available compilers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import native_build
import pytest

build = native_build.load()
KNOWN = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"


@pytest.fixture
def machine(monkeypatch):
    """A machine with these compilers, and a CUDA compiler that knows these architectures."""

    def has(cxx=True, nvcc=True, torch=True, known=KNOWN):
        monkeypatch.setattr(build.platform, "system", lambda: "Linux")
        monkeypatch.setattr(build, "cxx", lambda: ["c++"] if cxx else None)
        monkeypatch.setattr(build, "nvcc", lambda: "nvcc" if nvcc else None)
        monkeypatch.setattr(build, "torch_folder", lambda: Path("torch") if torch else None)
        monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=known.replace(" ", "\n")))

    monkeypatch.delenv("HQQ_OFT_BUILD", raising=False)
    return has


@pytest.mark.parametrize(
    ("choice", "have", "parts"),
    [
        ("", {}, ("cpu", "cuda")),
        ("auto", {"nvcc": False}, ("cpu",)),
        ("AUTO", {"known": "sm_50 sm_70"}, ("cpu",)),
        ("auto", {"cxx": False}, ()),
        ("auto", {"torch": False}, ()),
        ("cpu", {}, ("cpu",)),
        ("cuda", {}, ("cpu", "cuda")),
        ("0", {}, ()),
    ],
)
def test_the_setting_and_the_available_compilers_select_the_parts(machine, monkeypatch, choice, have, parts):
    machine(**have)
    monkeypatch.setenv("HQQ_OFT_BUILD", choice)
    assert build.parts() == parts


@pytest.mark.parametrize(
    ("choice", "have", "said"),
    [
        ("cpu", {"cxx": False}, "HQQ_OFT_BUILD=cpu, but no C.. compiler was found: install g.. or clang"),
        ("cuda", {"nvcc": False}, "HQQ_OFT_BUILD=cuda, but nvcc was not found: install the CUDA toolkit"),
        ("cuda", {"known": "sm_50"}, "nvcc supports none of sm_80, sm_89, sm_90a, sm_100: install a newer CUDA"),
        ("cuda", {"torch": False}, "PyTorch is not installed: install it"),
    ],
)
def test_requesting_a_part_without_its_compiler_raises(machine, monkeypatch, choice, have, said):
    machine(**have)
    monkeypatch.setenv("HQQ_OFT_BUILD", choice)
    with pytest.raises(build.BuildError, match=said):
        build.parts()


def test_an_unknown_setting_raises(machine, monkeypatch):
    machine()
    monkeypatch.setenv("HQQ_OFT_BUILD", "gpu")
    with pytest.raises(ValueError, match="HQQ_OFT_BUILD='gpu' is not understood; set it to one of auto, 0, cpu, cuda"):
        build.parts()


@pytest.mark.parametrize(
    ("known", "expected"),
    [(KNOWN, ["80", "89", "90a", "100"]), ("sm_80 sm_89 sm_90", ["80", "89", "90a"]), ("sm_70", [])],
)
def test_an_older_cuda_compiler_compiles_for_the_architectures_it_supports(machine, known, expected):
    machine(known=known)
    assert build.cuda_architectures() == expected
    if expected:
        commands = build.compile_commands(("cpu", "cuda"), Path("objects")).values()
        (kernels,) = [" ".join(map(str, command)) for command in commands if "launch.cu" in " ".join(map(str, command))]
        assert [part for part in ("80", "89", "90a", "100") if f"code=sm_{part}" in kernels] == expected
        newest = [each for each in expected if each.isdigit()][-1]
        assert f"arch=compute_{newest},code=compute_{newest}" in kernels


def test_without_a_compiler_a_message_is_printed(tmp_path):
    program = "import sys; sys.path.insert(0, 'csrc'); import build; build.cxx = lambda: None; print(build.parts())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=build.CSRC.parent)
    assert run.stdout == "()\n"
    assert "native kernels are not built: no C++ compiler was found: install g++ or clang++" in run.stderr
