"""Which parts are built, by `HQQ_OFT_BUILD` and the available compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest

build = native_build.load()
KNOWN = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_90a sm_100 sm_120"
NVCC = """#!/bin/sh
echo "$0 $*" >> "{calls}"
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-code) printf '%s\\n' {known} ;;
  *) {trial} ;;
esac
"""


def install_nvcc(folder, release="13.0", known=KNOWN, trial="exit 0"):
    """A CUDA compiler of that release in `folder`/bin, which compiles nothing; it records how it is called."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC.format(calls=folder / "calls", release=release, known=known, trial=trial))
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with these compilers; `nvcc` holds the arguments of `install_nvcc`."""

    def has(cxx=True, nvcc=True, torch=True):
        monkeypatch.setattr(build.platform, "system", lambda: "Linux")
        monkeypatch.setattr(build, "cxx", lambda: ["c++"] if cxx else None)
        monkeypatch.setattr(build, "torch_folder", lambda: Path("torch") if torch else None)
        if nvcc is False:
            monkeypatch.setattr(build, "nvcc", lambda: None)
        else:
            install_nvcc(tmp_path / "cuda", **({} if nvcc is True else nvcc))
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    for name in ("HQQ_OFT_BUILD", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return has


@pytest.mark.parametrize(
    ("choice", "have", "parts"),
    [
        ("", {}, ("cpu", "cuda")),
        ("auto", {"nvcc": False}, ("cpu",)),
        ("AUTO", {"nvcc": {"release": "11.8"}}, ("cpu",)),
        ("auto", {"nvcc": {"release": "12.0"}}, ("cpu", "cuda")),
        ("auto", {"nvcc": {"trial": "exit 1"}}, ("cpu",)),
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
        ("cuda", {"nvcc": {"release": "11.8"}}, "nvcc is of CUDA 11.8: install CUDA 12.0 or later, or set CUDA_HOME"),
        ("cuda", {"nvcc": {"release": "unknown"}}, "nvcc --version does not print a CUDA release: repair that CUDA"),
        (
            "cuda",
            {"nvcc": {"trial": "echo unsupported GNU version! >&2; exit 1"}},
            r"nvcc does not compile a trial \(unsupported GNU version!\): repair that CUDA toolkit, set CUDA_HOME",
        ),
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


def kernel_command():
    """What compiles the CUDA kernels."""
    commands = build.compile_commands(("cpu", "cuda"), Path("objects")).values()
    (kernels,) = [command for command in commands if any(word.endswith("launch.cu") for word in command)]
    return " ".join(kernels)


@pytest.mark.parametrize(
    ("known", "expected"),
    [(KNOWN, ["80", "89", "90", "100", "120"]), ("sm_80 sm_89 sm_90 sm_90a", ["80", "89", "90"])],
)
def test_kernels_are_compiled_for_the_architectures_that_the_cuda_compiler_knows(machine, known, expected):
    machine(nvcc={"known": known})
    assert re.findall(r"code=sm_(\w+)", kernel_command()) == expected
    # devices of other architectures compile it from PTX, which must hold all instructions that the code makes use of
    assert re.findall(r"arch=compute_90,code=compute_(\w+)", kernel_command()) == ["90"]


def test_cuda_home_comes_before_the_path(machine, monkeypatch, tmp_path):
    machine(nvcc=True)
    on_path = install_nvcc(tmp_path / "other")
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    assert build.nvcc() == str(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert build.nvcc() == str(on_path)
    monkeypatch.delenv("CUDA_HOME")
    assert build.nvcc() == str(on_path)


@pytest.mark.parametrize("cxx", ["g++-12", "ccache g++-12 -m64"])
def test_the_cpp_compiler_of_the_environment_compiles_for_nvcc_too(machine, monkeypatch, tmp_path, cxx):
    machine()
    assert "-ccbin" not in kernel_command()
    monkeypatch.setenv("CXX", cxx)
    assert build.parts() == ("cpu", "cuda")
    (trial,) = [line for line in (tmp_path / "cuda" / "calls").read_text().splitlines() if "trial.cu" in line]
    link = " ".join(build.link_command(("cpu", "cuda"), [], Path("out.so")))
    for command in (trial, kernel_command(), link):
        assert " -ccbin g++-12 " in command


@pytest.mark.parametrize("nvcc", [False, {"trial": "exit 1"}], ids=["none", "broken"])
def test_a_build_without_cuda_kernels_prints_the_reason(machine, capsys, nvcc):
    machine(nvcc=nvcc)
    assert build.parts() == ("cpu",)
    assert re.search(r"native kernels are built for the CPU only: .*nvcc .*set CUDA_HOME", capsys.readouterr().err)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_trial_compiles_with_a_working_compiler_and_fails_with_a_broken_one(monkeypatch):
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert build.cuda_missing() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "does not compile a trial" in build.cuda_missing()


def test_without_a_compiler_a_message_is_printed(tmp_path):
    program = "import sys; sys.path.insert(0, 'csrc'); import build; build.cxx = lambda: None; print(build.parts())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=build.CSRC.parent)
    assert run.stdout == "()\n"
    assert "native kernels are not built: no C++ compiler was found: install g++ or clang++" in run.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_without_ninja_everything_is_compiled_before_the_link(monkeypatch, tmp_path, fails):
    objects = [tmp_path / f"{name}.o" for name in "abc"]
    compiling = {path: ["touch", str(path)] for path in objects}
    if fails:
        compiling[objects[1]] = ["false"]
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "compile_commands", lambda *_: compiling)
    monkeypatch.setattr(build, "link_command", lambda parts, objects, out, _: ["cp", str(objects[2]), str(out)])
    if fails:
        with pytest.raises(subprocess.CalledProcessError):
            build.build(tmp_path / "out.so", ("cpu",), tmp_path)
    else:
        build.build(tmp_path / "out.so", ("cpu",), tmp_path)
    assert (tmp_path / "out.so").exists() != fails
