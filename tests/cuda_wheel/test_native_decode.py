"""The binding of the CUDA decode kernel on CUDA tensors, up to the launch.

The library has a CUDA runtime of its own, which the stub cannot replace. So the objects of the installed one are linked
again without, and that library is loaded instead, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import native_build
import pytest

from hqq_oft.ops import native

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "native"
PROGRAM = """
import ctypes, sys
import torch
load = torch.ops.load_library
torch.ops.load_library = lambda _: load(sys.argv[1])
import calls
from hqq_oft import backend
from hqq_oft.ops import native, table
assert native.cuda.has_kernels()
launches = ctypes.CDLL(None).stub_runtime_launches
for call in sys.argv[2:]:
    bits, m, b, adapters = map(int, call.split(","))
    weight = calls.quantized_weight(1120, 1024, bits=bits, group_size=64, dtype=torch.bfloat16, optimize=False)
    weight = type(weight)(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in weight.arguments()))
    many = (adapters,) if adapters else ()
    d = torch.empty(*many, 1024 // b, b, b, dtype=torch.bfloat16, device="cuda") if b else None
    index = torch.zeros(m, dtype=torch.int64, device="cuda") if adapters else None
    x = torch.empty(m, 1024, dtype=torch.bfloat16, device="cuda")
    with backend("native"):
        before = launches()
        y = table.linear(x, weight, d, x.new_empty(1120), index)
        print(tuple(y.shape), y.dtype, y.device, launches() - before)
"""
# bits, tokens, block size (0: no rotation), adapters (0: no index)
CALLS = [(8, 1, 32, 0), (4, 1, 32, 0), (4, 16, 128, 0), (4, 4, 32, 2), (3, 8, 16, 0), (2, 16, 0, 0), (1, 5, 64, 2)]


@pytest.mark.skipif(native.REASON != "" or not native.cuda.has_kernels(), reason="built without nvcc")
def test_every_packing_is_launched_on_cuda_tensors(tmp_path):
    library = tmp_path / "hqq_oft_native.so"
    objects = sorted(OBJECTS.rglob("*.o"))
    subprocess.run(native_build.load().link_command(("cpu",), objects, library), check=True)
    command = [sys.executable, "-c", PROGRAM, str(library), *(",".join(map(str, call)) for call in CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    results = done.stdout.splitlines()
    assert len(results) == len(CALLS)
    for (_, m, _, _), result in zip(CALLS, results, strict=True):
        assert result.startswith(f"({m}, 1120) torch.bfloat16 cuda:0 ")
        assert int(result.split()[-1]) in (1, 2)  # the rotation may have a launch of its own
