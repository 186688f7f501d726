"""Compiles csrc/ into one shared object: the CPU kernels, and the CUDA kernels if a working nvcc is available.

The object uses PyTorch's stable ABI and not Python's, so one build supports every Python and every PyTorch >= 2.10.
`setup.py` calls `build`; run `python csrc/build.py OUT [--sanitize]` to build manually.

HQQ_OFT_BUILD selects the parts: `auto` (what the available compilers allow), `cpu`, `cuda` (both), `0` (none). CXX
selects the C++ compiler, also that of nvcc; CUDA_HOME, before PATH, selects nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CHOICES = ("auto", "0", "cpu", "cuda")
OLDEST_TORCH = "0x020A000000000000"  # 2.10
OLDEST_NVCC = (12, 0)
CUDA_ARCHITECTURES = ("80", "89", "90", "100", "120")
# Later devices, and those between the architectures above, compile this PTX: the newest that the code makes use of.
PTX_ARCHITECTURE = "90"
COMPILER_LAUNCHERS = ("ccache", "distcc", "sccache")
TRIAL = """#include <cuda_runtime.h>
#include <optional>
__global__ void kernel(int* out) { *out = 1; }
void launch(std::optional<int*> out) { kernel<<<1, 1>>>(*out); }
"""

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
# Each translation unit of csrc/cpu/isa targets its own instruction set; one is selected at run time by CPU features.
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx_bf16": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}


class BuildError(Exception):
    """The native kernels cannot be built here; the message says why and what to do."""


def cxx() -> list[str] | None:
    """The C++ compiler's command."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return found and [found]


def nvcc() -> str | None:
    """The CUDA compiler's path: that of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"]
    if not homes[0]:
        homes = homes[1:]
    found = (shutil.which("nvcc", path=None if home is None else os.path.join(home, "bin")) for home in homes)
    return next((path for path in found if path), None)


def nvcc_command() -> list[str]:
    """nvcc with the options of every compilation and link; its C++ compiler is the one of CXX, if that is set."""
    path = nvcc()
    assert path is not None
    host = next((word for word in shlex.split(os.environ.get("CXX", "")) if word not in COMPILER_LAUNCHERS), None)
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [path, *(["-ccbin", host] if host else []), *options]


def _output(command: list[str]) -> str:
    """What a command prints, the empty string if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def cuda_architectures() -> list[str]:
    """Those of `CUDA_ARCHITECTURES` that the installed nvcc supports; older versions support fewer."""
    path = nvcc()
    known = _output([path, "--list-gpu-code"]).split() if path else []
    return [each for each in CUDA_ARCHITECTURES if f"sm_{each}" in known]


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot be built here, and what to do; None if they can."""
    path = nvcc()
    if path is None:
        return "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"
    release = re.search(r"release (\d+)\.(\d+)", _output([path, "--version"]))
    if release is None:
        return f"{path} --version does not print a CUDA release: repair that CUDA toolkit, or set CUDA_HOME to another"
    oldest = ".".join(map(str, OLDEST_NVCC))
    if tuple(map(int, release.groups())) < OLDEST_NVCC:
        return f"{path} is of CUDA {release[1]}.{release[2]}: install CUDA {oldest} or later, or set CUDA_HOME to one"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text(TRIAL)
        command = [*nvcc_command(), "-cudart=static", "-shared", str(source), "-o", f"{folder}/trial.so"]
        trial = subprocess.run(command, capture_output=True, text=True)
    if trial.returncode:
        said = (trial.stderr or trial.stdout).strip().splitlines()
        return (
            f"{path} does not compile a trial ({said[0] if said else f'exit status {trial.returncode}'}): repair that "
            "CUDA toolkit, set CUDA_HOME to another, or CXX to a C++ compiler that it supports"
        )
    return None


def torch_folder() -> Path | None:
    """PyTorch's installation folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def parts() -> tuple[str, ...]:
    """Parts to build, from `HQQ_OFT_BUILD` and the available compilers: `()`, `("cpu",)` or `("cpu", "cuda")`.

    Raises:
        BuildError: an explicitly requested part cannot be built.
        ValueError: the variable has any other value.
    """
    choice = os.environ.get("HQQ_OFT_BUILD", "").strip().lower() or "auto"
    if choice not in CHOICES:
        raise ValueError(f"HQQ_OFT_BUILD={choice!r} is not understood; set it to one of {', '.join(CHOICES)}.")
    if choice == "0":
        return ()
    cpu_missing = None
    if platform.system() != "Linux":
        cpu_missing = "the native kernels build only on Linux"
    elif cxx() is None:
        cpu_missing = "no C++ compiler was found: install g++ or clang++, or set CXX"
    elif torch_folder() is None:
        cpu_missing = "PyTorch is not installed: install it, then install hqq-oft with --no-build-isolation"
    if choice == "auto" and cpu_missing:
        print(f"hqq_oft: native kernels are not built: {cpu_missing}.", file=sys.stderr)
        return ()
    missing = cpu_missing or (cuda_missing() if choice != "cpu" else None)
    if choice == "auto" and missing:
        print(f"hqq_oft: native kernels are built for the CPU only: {missing}.", file=sys.stderr)
        return ("cpu",)
    if missing:
        raise BuildError(f"HQQ_OFT_BUILD={choice}, but {missing}. Unset it to build what the compilers allow.")
    return ("cpu",) if choice == "cpu" else ("cpu", "cuda")


def compile_commands(parts: tuple[str, ...], objects: Path, sanitize: bool = False) -> dict[Path, list[str]]:
    """The command that makes each object file. Also writes `$out.d`, the dependencies for ninja."""
    torch = torch_folder()
    compiler = cxx()
    assert torch is not None
    assert compiler is not None
    optimise = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else ["-O3"]
    # GCC 12 warns about uninitialized values in its own AVX-512 intrinsics.
    # Without -ffp-contract=off the bytes that the quantizer chooses would depend on the processor. The vectors that
    # -Wpsabi warns about are only passed to functions that are inlined.
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-uninitialized",
             "-Wno-maybe-uninitialized", "-Wno-psabi", "-ffp-contract=off", *optimise]  # fmt: skip
    binding = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{CSRC}", "-isystem", str(torch / "include")]
    x86 = platform.machine() in ("x86_64", "AMD64")
    commands: dict[Path, list[str]] = {}

    def add(source: Path, command: list[str]) -> None:
        out = objects / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
        commands[out] = [*command, "-MD", "-MF", f"{out}.d", "-c", str(source), "-o", str(out)]

    for name, target in INSTRUCTION_SETS.items():
        if name == "portable" or x86:
            add(CSRC / "cpu" / "isa" / f"{name}.cpp", [*compiler, *flags, *target])
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        add(source, [*compiler, *flags])
    for source in sorted(CSRC.glob("*.cpp")):
        add(source, [*compiler, *flags, *binding])
    if "cuda" in parts:
        for source in sorted((CSRC / "cuda").glob("*.cpp")):
            add(source, [*compiler, *flags, *binding])
        targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in cuda_architectures()]
        targets += [f"-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}"]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            add(source, [*nvcc_command(), "--threads=0", f"-I{CSRC}", *targets])  # architectures in parallel
    return commands


def link_command(parts: tuple[str, ...], objects: list[Path], out: Path, sanitize: bool = False) -> list[str]:
    """The command that links the object files to `out`. PyTorch's libraries are already loaded when this one is."""
    torch, compiler = torch_folder(), cxx()
    assert torch is not None
    assert compiler is not None
    # nvcc links the CUDA runtime statically; PyTorch does not necessarily provide it.
    driver = [*nvcc_command(), "-cudart=static"] if "cuda" in parts else compiler
    command = [*driver, "-shared", *map(str, objects), "-o", str(out), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sanitize:
        command += [*(["-Xcompiler"] if "cuda" in parts else []), "-fsanitize=address,undefined"]
    return command


def build(out: Path, parts: tuple[str, ...], objects: Path, sanitize: bool = False) -> None:
    """Compile in parallel and link; incrementally, if ninja is installed.

    Args:
        out: the shared object.
        parts: as returned by `parts()`.
        objects: folder for object files.
        sanitize: enable AddressSanitizer and UndefinedBehaviorSanitizer.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    commands = compile_commands(parts, objects, sanitize)
    link = link_command(parts, list(commands), out, sanitize)
    for path in (*commands, out):
        path.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands.values()))
        subprocess.run(link, check=True)
        return

    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $line", "  description = $out", "  deps = gcc", "  depfile = $out.d",
             "rule link", "  command = $line", "  description = $out"]  # fmt: skip
    for path, command in commands.items():
        source = command[command.index("-c") + 1]
        lines += [f"build {escaped(path)}: run {escaped(Path(source))}"]
        lines += [f"  line = {shlex.join(command).replace('$', '$$')}"]
    lines += [f"build {escaped(out)}: link {' '.join(map(escaped, commands))}"]
    lines += [f"  line = {shlex.join(link).replace('$', '$$')}", ""]
    (objects / "build.ninja").write_text("\n".join(lines))
    subprocess.run([ninja, "-C", str(objects), "-f", str(objects / "build.ninja")], check=True)


def main() -> None:
    """`python csrc/build.py OUT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the shared object to build")
    parser.add_argument("--sanitize", action="store_true", help="build with AddressSanitizer and UBSan")
    options = parser.parse_args()
    chosen = parts()
    if not chosen:
        sys.exit("nothing to build")
    objects = CSRC.parent / "build" / ("native-sanitized" if options.sanitize else "native")
    build(options.out.resolve(), chosen, objects, options.sanitize)


if __name__ == "__main__":
    main()
