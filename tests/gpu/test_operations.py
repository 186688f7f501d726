"""Every operation on the Triton backend against the reference in float64."""

from __future__ import annotations

import calls
import pytest
import torch

from hqq_oft.ops import reference

from .cases import check, operations, run, skew_parameters

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BY_TOKENS = ["linear", "linear_backward", "rotate", "rotate_backward"]
BY_WEIGHT = ["cayley", "cayley_backward", "dequantize", "dequantize_rotate"]
LARGE = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
RAGGED = [(72, 96, 32), (20, 64, 16), (100, 288, 32)]  # out-features, in-features, group
BLOCKS = [16, 32, 64, 96, 128, 256]
MIXED = [(1, 1), (7, 2), (33, 3), (300, 2)]  # tokens, adapters


def shape_id(shape):
    return "x".join(str(size) for size in shape)


@pytest.mark.parametrize("m", [1, 7, 16, 33, 128, 512, 2048])
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
@pytest.mark.parametrize("name", BY_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(name, shape, m, dtype, device):
    check(name, operations(m, *shape, 32, device, dtype)[name], dtype)


@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
@pytest.mark.parametrize("name", BY_WEIGHT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_weights(name, shape, dtype, device):
    check(name, operations(1, *shape, 32, device, dtype)[name], dtype)


@pytest.mark.parametrize("m", [1, 7, 33, 300])
@pytest.mark.parametrize("shape", RAGGED, ids=shape_id)
@pytest.mark.parametrize("name", [*BY_TOKENS, "dequantize", "dequantize_rotate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged(name, shape, m, dtype, device):
    n, k, group = shape
    check(name, operations(m, n, k, 16, device, dtype, group=group)[name], dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("shape", [(64, 96, 32), (20, 64, 16)], ids=shape_id)
@pytest.mark.parametrize("name", ["linear", "linear_backward", "dequantize", "dequantize_rotate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_packing(name, shape, bits, axis, dtype, device):
    n, k, group = shape
    for m in (7, 300):
        check(name, operations(m, n, k, 16, device, dtype, bits=bits, group=group, axis=axis)[name], dtype)


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("name", [*BY_TOKENS, "dequantize_rotate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_sizes(name, b, shared, m, dtype, device):
    check(name, operations(m, 64, 768, b, device, dtype, stored=1 if shared else None)[name], dtype)


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("name", ["rotate", "rotate_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed(name, b, m, dtype, device):
    check(name, operations(m, 64, 768, b, device, dtype, transpose=True)[name], dtype)


@pytest.mark.parametrize("terms", [1, 2, 4, 5, 8, None])
@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("name", ["cayley", "cayley_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cayley(name, b, terms, dtype, device):
    check(name, operations(1, 8, 768, b, device, dtype, terms=terms)[name], dtype)


@pytest.mark.parametrize("stored", [6, 1])
@pytest.mark.parametrize("terms", [5, None])
@pytest.mark.parametrize("b", [16, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cayley_with_dropped_and_bounded_blocks(b, terms, stored, dtype, device):
    v = skew_parameters(stored, b, device, dtype)
    keep = torch.tensor([True, False, True, True, False, True], device=device)
    grad = torch.randn(6, b, b, device=device)
    check("cayley", (v, b, terms, keep, 0.1, dtype), dtype)
    check("cayley_backward", (grad, v, b, terms, keep, 0.1), dtype)


@pytest.mark.parametrize("tokens", MIXED, ids=shape_id)
@pytest.mark.parametrize("b", [16, 32, 96, 256])
@pytest.mark.parametrize("name", BY_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_adapters(name, b, tokens, dtype, device):
    m, adapters = tokens
    check(name, operations(m, 64, 768, b, device, dtype, adapters=adapters)[name], dtype)


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("name", ["linear", "linear_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_rotation(name, m, dtype, device):
    args = operations(m, 64, 96, 16, device, dtype, group=32)[name]
    check(name, calls.without_rotation(name, args), dtype)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "d"])
@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("name", ["linear_backward", "rotate_backward"])
def test_only_one_gradient_is_needed(name, m, needs, device):
    args = operations(m, 64, 96, 16, device, torch.bfloat16, group=32)[name]
    check(name, (*args[:-2], *needs), torch.bfloat16)


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("layout", ["columns", "padded"])
@pytest.mark.parametrize("name", BY_TOKENS)
def test_strided_inputs(name, layout, m, device):
    def strided(tensor):
        if layout == "columns":
            return tensor.t().contiguous().t()
        return torch.nn.functional.pad(tensor, (0, 24))[:, : tensor.shape[1]]

    args = list(operations(m, 64, 96, 16, device, torch.bfloat16, group=32)[name])
    for i in range(2 if name.endswith("backward") else 1):
        args[i] = strided(args[i])
    check(name, tuple(args), torch.bfloat16)


@pytest.mark.parametrize("name", BY_TOKENS)
def test_no_tokens(name, device):
    for out in run(name, operations(0, 64, 96, 16, device, torch.bfloat16, group=32)[name]):
        assert not out.any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [24, 64, 128, 512])
@pytest.mark.parametrize("sd", [1e-5, 0.02, 1.0])
def test_quantized_bytes_are_those_of_the_processor(sd, group, bits, axis, device):
    w = torch.randn(768, 512) * sd
    for dtype in DTYPES:
        args = w.to(dtype), 2**bits, bits, group, axis, bits == 4, 20, torch.bfloat16, None
        expected, found = reference.quantize(*args), run("quantize", (args[0].to(device), *args[1:]))
        for theirs, ours in zip(expected[:3], found[:3], strict=True):
            different = (ours.cpu() != theirs).float().mean()
            assert different <= (
                1e-4 if sd == 1 else 0
            )  # where residuals are shrunk, the power's last bit decides ties
        torch.testing.assert_close(found[3].cpu(), expected[3], rtol=1e-5, atol=0)
