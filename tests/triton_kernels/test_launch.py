"""A launch: compiled at its first call, launched directly after that, compiled again where its precision changes."""

from __future__ import annotations

from types import SimpleNamespace

import calls
import pytest
import torch
import triton.language as tl
from helpers import hqq_layer
from hqq_oft.triton_kernels import _launch, rotate

from hqq_oft import QuantizedWeight, Unsupported
from hqq_oft.ops import table as ops


@pytest.mark.parametrize("m", [3, 40, 260])
@pytest.mark.parametrize("b", [8, 96])
def test_a_repeated_call_gives_the_same_result(m, b):
    weight = QuantizedWeight.from_hqq(hqq_layer(40, 96, optimize=False))
    v, d = torch.randn(96 // b, b * (b - 1) // 2) * 0.02, torch.randn(96 // b, b, b) * 0.1
    x, grad, dy = torch.randn(m, 96), torch.randn(m, 96), torch.randn(m, 40)
    for name, args in (
        ("cayley", (v, b, 5, None, None, torch.float32)),
        ("cayley_backward", (d, v, b, None, None, None)),
        ("rotate", (x, d, None, False)),
        ("rotate_backward", (grad, x, d, None, False, True, True)),
        ("dequantize", (weight, torch.float32)),
        ("dequantize_rotate", (weight, d, torch.float32)),
        ("linear", calls.linear(x, weight, d, torch.randn(40))),
        ("linear_backward", calls.linear_backward(dy, x, weight, d)),
    ):
        first, *others = (ops.OPERATIONS[name](*args) for _ in range(3))
        for other in others:
            pairs = zip(first, other, strict=True) if isinstance(first, tuple) else [(first, other)]
            assert all(torch.equal(*pair) for pair in pairs), name


def test_calls_that_share_a_plan_compute_with_their_own_arguments():
    d = [torch.randn(12, 8, 8) * 0.1 for _ in range(2)]
    weights = [QuantizedWeight.from_hqq(hqq_layer(40, 96, optimize=False)) for _ in range(2)]
    inputs = [torch.randn(5, 96) for _ in range(2)]
    assert weights[0].layout == weights[1].layout
    for x in inputs:
        for weight in weights:
            for rotation in d:
                rotated = x + (x.view(5, 12, 1, 8) @ rotation).view(5, 96)
                expected = rotated @ weight.dense(torch.float32).T
                torch.testing.assert_close(ops.linear(x, weight, rotation, None, None), expected)


class Kernel:
    """A kernel that notes what it is compiled for, and what the compiled ones are launched with."""

    arg_names = ("x_ptr", "M", "BLOCK", "PRECISION")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **constants):
            self.compiled.append((grid, constants))
            return {grid: lambda *args, stream: self.launched.append((args, stream))}

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(
        _launch, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    return Kernel()


@pytest.mark.parametrize("grid", [(2**31,), (1, 2**16), (1, 1, 2**16)])
def test_a_grid_that_no_gpu_accepts_is_refused(kernel, grid):
    with pytest.raises(Unsupported, match=r"a grid of \(.*\) programs is too large: a GPU accepts \(2147483647, 65535"):
        _launch.Launch(kernel, grid)
    _launch.Launch(kernel, tuple(size - 1 for size in grid))


def test_the_gradient_of_the_largest_blocks_fits_a_grid():
    """A block of 16640 columns has 260 * 260 tiles, more than a grid's second dimension."""
    b = 64 * 260
    x, d = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((64, b), (1, b, b)))
    rotate.plan_rotation_gradient(x, x, d, None, False, False)


@pytest.fixture
def _tf32(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_only_the_first_call_compiles(kernel):
    launch, x = _launch.Launch(kernel, (3, 2), tl.bfloat16, BLOCK=64, num_warps=4), torch.zeros(4)
    for m in (5, 6, 7):
        launch(x, m)
    options = {"enable_fp_fusion": True, "BLOCK": 64, "PRECISION": "ieee", "num_warps": 4}
    assert kernel.compiled == [((3, 2, 1), options)]
    assert [(args[1:], stream) for args, stream in kernel.launched] == [
        ((6, 64, "ieee"), "stream of 0"),
        ((7, 64, "ieee"), "stream of 0"),
    ]
    assert all(args[0] is x for args, _ in kernel.launched)


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize(
    ("operands", "precisions"), [(tl.float32, ["tf32x3", "tf32", "tf32x3"]), (tl.float16, ["ieee"])]
)
def test_float32_products_follow_what_pytorch_allows(kernel, operands, precisions):
    launch, x = _launch.Launch(kernel, (1,), operands, BLOCK=64), torch.zeros(4)
    for allowed in ("ieee", "tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = allowed
        launch(x, 1)
        launch(x, 1)
        expected = "ieee" if operands == tl.float16 else {"tf32": "tf32", "ieee": "tf32x3"}[allowed]
        assert kernel.launched[-1][0] == (x, 1, 64, expected)
    assert [constants["PRECISION"] for _, constants in kernel.compiled] == precisions
