"""The CUDA decode kernel compiles for every architecture: no spills, few enough registers, the right instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import native_build
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
build = native_build.load()
NVCC = build.nvcc()
ARCHITECTURES = [f"sm_{each}" for each in build.CUDA_ARCHITECTURES]
REGISTERS = 65536  # of a multiprocessor, on all of them
THREADS = 256  # of a block

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def compile_for(architecture: str, folder: Path) -> tuple[Path, str]:
    """The object for an architecture and what ptxas says about it."""
    compiled = folder / f"{architecture}.o"
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-c", "-o", compiled]
    done = subprocess.run([*command, SOURCES / "launch.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return compiled, done.stderr


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, bytes of stack and of spills, of `-Xptxas -v`."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    return {
        name: (int(registers), int(stack), int(stores) + int(loads)) for name, stack, stores, loads, registers in found
    }


def decode_parameters(name: str) -> tuple[str, int, int, int] | None:
    """Format, bits, span and tiles of tokens of a decode kernel's mangled name."""
    found = re.search(r"decode_kernelINS0_\d+(Half|BFloat16)ELi(\d)ELi(\d+)ELi(\d)E", name)
    return None if found is None else (found[1], int(found[2]), int(found[3]), int(found[4]))


def blocks_to_a_multiprocessor(bits: int, token_tiles: int) -> int:
    """`max_resident` of layout.h."""
    return 1 if bits in (1, 3) or (bits == 2 and token_tiles == 2) else 2


def check_registers(report: str) -> None:
    kernels = resources(report)
    assert sum("rotate_kernel" in name for name in kernels) == 2
    decode = {decode_parameters(name): of for name, of in kernels.items() if decode_parameters(name)}
    assert set(decode) == {
        (form, bits, span, tiles)
        for form in ("Half", "BFloat16")
        for bits in (8, 4, 3, 2, 1)
        for span in (64, 32)
        for tiles in ((1,) if bits == 3 else (1, 2))
    }
    for name, (_, stack, spills) in kernels.items():
        assert (stack, spills) == (0, 0), name
    for (form, bits, span, tiles), (registers, _, _) in decode.items():
        allocated = -(-registers // 8) * 8  # to a thread
        blocks = blocks_to_a_multiprocessor(bits, tiles)
        assert allocated * THREADS * blocks <= REGISTERS, (form, bits, span, tiles)


def cuobjdump() -> Path:
    """Of the CUDA toolkit, else the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    if find_spec("triton") is None:
        pytest.skip("needs cuobjdump")
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def check_instructions(compiled: Path) -> None:
    """Levels come by 16-byte copies past L1 under a cache policy, products go to the matrix units."""
    listing = subprocess.run([cuobjdump(), "-sass", compiled], capture_output=True, text=True, check=True).stdout
    _, *functions = listing.split("Function : ")
    seen = 0
    for function in functions:
        parameters = decode_parameters(function.split()[0])
        if parameters is None:
            continue
        seen += 1
        copies = re.findall(r"LDGSTS\S*BYPASS\S*128\S* \[[^]]*\], (\S*?)\[", function)
        assert copies, parameters
        assert all(policy.startswith("desc") for policy in copies), parameters
        assert re.search(r"HMMA\.16816\.F32" + (r"\.BF16" if parameters[0] == "BFloat16" else r" "), function)
        assert not re.search(r"\b(LDL|STL)\b", function), parameters
        assert "ATOM" in function  # tickets are integers; sums are never added by atomics
        assert not re.search(r"(ATOM|RED)\S*\.(F16|F32|BF16|F64)", function), parameters
    assert seen == 36


def check_chained_launches(architecture: str, compiled: Path, folder: Path) -> None:
    """A launch may overlap with the one before it only if its code waits for it."""
    program = folder / "launch_chained"
    source = Path(__file__).with_name("launch_chained.cpp")
    command = [NVCC, "-std=c++17", "-cudart=none", f"-I{SOURCES}", "-o", program, source, compiled]
    subprocess.run(command, check=True)

    def attributes(ptx_version: int, chained: bool) -> int:
        run = subprocess.run([program, str(ptx_version), str(int(chained))], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert [attributes(version, True) for version in (80, 89, 90, 100)] == [0, 0, 1, 1]
    assert attributes(90, False) == 0
    listing = subprocess.run([cuobjdump(), "-sass", compiled], capture_output=True, text=True, check=True).stdout
    assert ("ACQBULK" in listing) == (int(architecture.removeprefix("sm_")) >= 90)  # griddepcontrol.wait


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[] if each == "sm_90" else pytest.mark.all_targets) for each in ARCHITECTURES],
)
def test_compiles(architecture, tmp_path):
    compiled, report = compile_for(architecture, tmp_path)
    check_registers(report)
    check_instructions(compiled)
    check_chained_launches(architecture, compiled, tmp_path)


def test_weights_are_the_first_to_leave_the_l2_cache(tmp_path):
    listing = tmp_path / "launch.ptx"
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_80", "-ptx", "-o", listing, SOURCES / "launch.cu"]
    subprocess.run(command, check=True)
    text = listing.read_text()
    policies = set(re.findall(r"createpolicy\S*evict_first\S* (%rd\d+)", text))
    copies = re.findall(r"cp\.async\.cg\.shared\.global(\S*) \[.*?\], \[.*?\], 16, \S+, (%rd\d+);", text)
    assert copies
    assert all(hint == ".L2::cache_hint" and policy in policies for hint, policy in copies)
