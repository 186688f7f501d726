"""Products of bfloat16 rows with packed levels: every kernel that M chooses, and the edges of their tiles."""

from __future__ import annotations

from dataclasses import replace

import calls
import oracle
import pytest
import torch
from gpu.cases import check, operations, quantized_weight, relative_error, run

from hqq_oft.ops import native as _native
from hqq_oft.ops import table as ops

BF16 = torch.bfloat16
# out-features, in-features, group size. Bands of 40, 20 and 10 rows: the last tile of 16 is short. A single row in each
# band, and rows that are no multiple of what a task takes. Chunks of columns that are short; more than 16 groups.
# Groups of whole rows, and longer than what is decoded at a time. Pairs of rows in chunks that are short, and reach
# from one pair of bands into the next.
SHAPES = [(80, 192, 64), (8, 64, 64), (40, 1216, 64), (64, 512, 512), (1104, 128, 64)]

pytestmark = pytest.mark.usefixtures("instruction_set")
PACKED = ("avx512_bf16", "amx_bf16")  # instruction sets that multiply packed bfloat16 weights at any number of rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 2, 1])
def test_every_number_of_rows(shape, bits):
    """One row, few, some and many, each in whole vectors and shares and not."""
    n, k, group = shape
    for m in (1, 4, 5, 12, 13, 31, 63, 64, 65, 80, 97):
        args = operations(m, n, k, 32, "cpu", BF16, bits=bits, group=group)
        for name in ("linear", "linear_backward"):
            check(name, args[name], BF16, on="native")


@pytest.mark.parametrize("m", [513, 1030, 2049, 2100])
def test_more_rows_than_one_task_and_one_copy_take(m):
    args = operations(m, 80, 192, 32, "cpu", BF16)
    for name in ("linear", "linear_backward"):
        check(name, args[name], BF16, on="native")


def test_tasks_of_several_tiles():
    """Many columns of x, or of dy, are multiplied by several tiles of W at a time; the last task has fewer."""
    for n, k in ((176, 1088), (1100, 320)):
        args = operations(520, n, k, 32, "cpu", BF16)
        for name in ("linear", "linear_backward"):
            check(name, args[name], BF16, on="native")


@pytest.mark.parametrize("m", [3, 9, 70])
def test_every_row_and_column_is_written_to_its_position(m):
    """Powers of two times small levels are exact in bfloat16, so each product with a single weight is exact."""
    n, k = 160, 192
    weight = quantized_weight(n, k, "cpu", dtype=BF16)
    weight = replace(weight, scale=torch.full_like(weight.scale, 0.5), zero=torch.full_like(weight.zero, 3.0))
    truth = oracle.weight(weight.packed, weight.scale, weight.zero, (n, k), 4, 64, 1)
    for first in range(0, max(n, k), m):
        for size, product in (
            (k, lambda x: (ops.linear(*calls.linear(x, weight)), truth.T)),
            (n, lambda dy: (ops.linear_backward(*calls.linear_backward(dy, dy, weight, need_d=False))[0], truth)),
        ):
            x = torch.zeros(m, size, dtype=BF16)
            rows = torch.arange(m)[: max(0, size - first)]
            x[rows, first + rows] = 1
            out, wanted = product(x)
            assert torch.equal(out.double(), x.double() @ wanted)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float16), (BF16, torch.float32)]
)
def test_scale_and_zero_of_any_dtype(dtypes):
    weight = quantized_weight(80, 192, "cpu", dtype=BF16)
    weight = replace(weight, scale=weight.scale.to(dtypes[0]), zero=weight.zero.to(dtypes[1]))
    for m in (3, 20, 90):
        x, dy = torch.randn(m, 192).to(BF16), torch.randn(m, 80).to(BF16)
        check("linear", calls.linear(x, weight, None, torch.randn(80)), BF16, on="native")
        check("linear_backward", calls.linear_backward(dy, x, weight, need_d=False), BF16, on="native")


@pytest.mark.parametrize("m", [3, 20, 90])
def test_inputs_that_are_not_contiguous(m):
    weight = quantized_weight(80, 192, "cpu", dtype=BF16)
    x, dy = torch.randn(m, 2 * 192).to(BF16)[:, ::2], torch.randn(80, m).to(BF16).T
    check("linear", calls.linear(x, weight), BF16, on="native")
    check("linear_backward", calls.linear_backward(dy, x, weight, need_d=False), BF16, on="native")


def test_rows_longer_than_a_slice_of_the_few():
    for name, args in operations(4, 32, 4160, 32, "cpu", BF16).items():
        if name.startswith("linear"):
            check(name, args, BF16, on="native")


@pytest.mark.parametrize("m", [3, 20, 70])
def test_nan_affects_only_its_own_row(instruction_set, m):
    # Others decode W for oneDNN, which on AMX multiplies the next row of dy by zeros if 32 does not divide N.
    N = 80 if instruction_set in PACKED else 96
    weight = quantized_weight(N, 192, "cpu", dtype=BF16)
    x, dy = torch.randn(m, 192).to(BF16), torch.randn(m, N).to(BF16)
    for value in (float("nan"), float("inf")):
        for given, product in (
            (x, lambda x: ops.linear(*calls.linear(x, weight))),
            (dy, lambda dy: ops.linear_backward(*calls.linear_backward(dy, dy, weight, need_d=False))[0]),
        ):
            bad = given.clone()
            bad[1, 5] = value
            out, expected = product(bad), product(given)
            assert not torch.isfinite(out[1]).any()
            others = [row for row in range(m) if row != 1]
            assert torch.equal(out[others], expected[others])


@pytest.mark.usefixtures("fresh_plans")
def test_packed_products_do_not_materialize_the_dense_weight(instruction_set, monkeypatch):
    lib = _native.cpu._lib
    decoded = []

    class Spied:
        def __getattr__(self, name):
            return (
                getattr(lib, name)
                if name != "dequantize_into"
                else lambda *args: decoded.append(lib.dequantize_into(*args))
            )

    monkeypatch.setattr(_native.cpu, "_lib", Spied())
    for m in (17, 100):
        args = operations(m, 64, 128, 32, "cpu", BF16)
        for name in ("linear", "linear_backward"):
            decoded.clear()
            run(name, args[name], "native")
            assert bool(decoded) == (instruction_set not in PACKED)


def test_few_and_more_rows_take_different_kernels(instruction_set):
    """Few rows apply the scale separately; more rows round level * scale to bfloat16 first, where 1 + 2^-9 is 1."""
    if instruction_set not in PACKED:
        pytest.skip("the weight is never rounded")
    weight = quantized_weight(64, 128, "cpu", dtype=torch.float32)
    scale = torch.ones_like(weight.scale)
    scale[::2] += 2**-9  # of the first of two groups in each row
    packed, zero = torch.full_like(weight.packed, 0x55), torch.zeros_like(weight.zero)
    weight = replace(weight, packed=packed, scale=scale, zero=zero)
    rounded_from = 8 if instruction_set == "amx_bf16" else 64
    for m, out in ((4, 2.5), (5, 2.5), (rounded_from - 1, 2.5), (rounded_from, 0)):
        x = torch.zeros(m, 128, dtype=BF16)
        x[:, 7], x[:, 70] = 256, -256
        assert torch.equal(ops.linear(*calls.linear(x, weight)), torch.full((m, 64), out, dtype=BF16))


def test_packed_kernels_run_on_supported_cpus(instruction_set):
    """On packed weights for any number of rows, or through decoded chunks."""
    x = torch.randn(3, 128, dtype=BF16)
    serves = torch.ops.hqq_oft_native.multiplies_packed
    fast = instruction_set in PACKED
    for n, bits, group, axis, dtype, able in (
        (64, 4, 64, 1, BF16, True), (2, 4, 64, 1, BF16, True), (64, 2, 64, 1, BF16, True), (64, 1, 128, 1, BF16, True),
        (64, 8, 64, 1, BF16, False), (64, 3, 64, 1, BF16, False), (64, 4, 64, 0, BF16, False),
        (64, 4, 32, 1, BF16, False), (64, 4, 256, 1, BF16, False), (20, 1, 64, 1, BF16, False),
        (64, 4, 64, 1, torch.float32, False), (64, 4, 64, 1, torch.float16, False),
    ):  # fmt: skip
        assert serves(x.to(dtype), n, 128, bits, group, axis) == (able and fast)
    check("linear", operations(3, 20, 128, 32, "cpu", BF16, bits=1)["linear"], BF16, on="native")


def test_the_transposed_product_refuses_what_it_does_not_serve():
    weight = quantized_weight(64, 128, "cpu", bits=8).arguments()
    product = torch.ops.hqq_oft_native.linear_transposed
    with pytest.raises(RuntimeError, match="not supported for these arguments; check `multiplies_packed`"):
        product(torch.randn(2, 64, dtype=BF16), *weight)
    with pytest.raises(RuntimeError, match="does not fit the weight's out-features"):
        product(torch.randn(2, 63, dtype=BF16), *weight)


def test_results_are_bitwise_equal_for_every_number_of_threads():
    before = torch.get_num_threads()
    args = operations(130, 160, 320, 32, "cpu", BF16)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([run(name, args[name], "native") for name in ("linear", "linear_backward")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_zeros_far_from_the_levels():
    """An offset added and subtracted in float32 must cancel: zeros may lie outside the range of the levels."""
    weight = quantized_weight(64, 256, "cpu", dtype=BF16)
    weight = replace(weight, zero=weight.zero * 20 - 100)
    truth = oracle.weight(weight.packed, weight.scale, weight.zero, (64, 256), 4, 64, 1)
    for m in (2, 20, 90):
        x = torch.randn(m, 256).to(BF16)
        assert relative_error(ops.linear(*calls.linear(x, weight)), x.double() @ truth.T) <= 4e-3
