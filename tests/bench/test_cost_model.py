"""The bytes-and-operations model against figures worked out by hand."""

from __future__ import annotations

import pytest

from bench import model
from bench.model import Cost, Layer, predicted_seconds

BANDWIDTH, RATE = 4.3e12, 790e12


def microseconds(passes):
    return 1e6 * predicted_seconds(passes, BANDWIDTH, RATE)


@pytest.mark.parametrize(
    ("bits", "group", "per_weight"),
    [
        (8, 64, 1 + 4 / 64),
        (6, 64, 1 + 4 / 64),
        (4, 64, 0.5625),
        (4, 128, 0.53125),
        (3, 64, 0.4 + 4 / 64),
        (2, 16, 0.5),
        (1.58, 64, 0.3125),
        (1, 64, 0.1875),
        (4, None, 0.5 + 4 / 4096),
    ],
)
def test_bytes_per_weight(bits, group, per_weight):
    layer = Layer(14336, 4096, bits=bits, group=group)
    assert layer.weight_bytes == pytest.approx(14336 * 4096 * per_weight)


@pytest.mark.parametrize(("n", "k", "floor"), [(4096, 4096, 2.2), (14336, 4096, 7.7), (28672, 8192, 31)])
def test_decoding_is_bound_by_the_packed_weight(n, k, floor):
    layer = Layer(n, k)
    # Rounded as the figure is.
    assert 1e6 * layer.weight_bytes / BANDWIDTH == pytest.approx(floor, abs=0.5 if floor > 10 else 0.05)
    # D, x and y add 3% at most.
    assert 1 < microseconds(model.linear(layer, 1, scratch=False)) / (1e6 * layer.weight_bytes / BANDWIDTH) < 1.03


def test_scratch_adds_235_over_m_of_the_product():
    layer = Layer(4096, 4096)
    for m in (256, 1024, 4096):
        added = microseconds(model.dequantize(layer)) / microseconds(model.gemm(layer, m))
        assert added * m == pytest.approx(235, rel=0.01)


def test_forward_and_backward_at_4096():
    layer = Layer(4096, 4096)
    m = 4096
    dense = 2 * microseconds(model.gemm(layer, m))
    assert dense == pytest.approx(348, abs=0.5)
    # Rotating W is fused into the pass that decodes it; the backward pass over x and g remains.
    rotating_w = microseconds(model.linear(layer, m, scratch=True) + model.linear_backward(layer, m, scratch=True))
    assert rotating_w == pytest.approx(348 + 2 * 10 + 23.5, abs=0.5)
    # Rotating x instead costs a pass that reads and writes it.
    plain = Layer(4096, 4096, block=None)
    forward = (model.rotate(layer, m), *model.linear(plain, m, scratch=True))
    rotating_x = microseconds(forward + model.linear_backward(layer, m, scratch=True))
    assert rotating_x == pytest.approx(407, abs=0.6)


def test_costs_by_hand():
    layer = Layer(8, 64, block=32, bits=4, group=64)  # 8 groups: 256 bytes of levels, 32 of scales and zeros
    rotation = 64 * 32 * 2
    assert layer.weight_bytes == 288
    assert layer.rotation_bytes == rotation == 4096
    assert model.rotate(layer, 3) == Cost(2 * 3 * 64 * 2 + rotation, 2 * 3 * 64 * 32)
    assert model.rotate_backward(layer, 3) == Cost(3 * 3 * 64 * 2 + rotation + 2 * 32 * 32 * 4, 2 * 2 * 3 * 64 * 32)
    assert model.dequantize(layer) == Cost(288 + 1024, 1024)
    assert model.dequantize_rotate(layer) == Cost(288 + 1024 + rotation, 1024 + 2 * 8 * 64 * 32)
    x, y, product = 3 * 64 * 2, 3 * 8 * 2, 2 * 3 * 8 * 64
    assert model.gemm(layer, 3) == Cost(x + 1024 + y, product)
    assert model.linear(layer, 3, scratch=False) == (Cost(x + 288 + y + rotation, product + 2 * 3 * 64 * 32),)
    assert model.linear(layer, 3, scratch=True) == (model.dequantize_rotate(layer), model.gemm(layer, 3))
    assert model.linear_backward(layer, 3, scratch=False) == (
        Cost(x + 288 + y, product),
        model.rotate_backward(layer, 3),
    )
    assert model.linear_backward(layer, 3, scratch=True) == (
        model.dequantize(layer),
        model.gemm(layer, 3),
        model.rotate_backward(layer, 3),
    )


def test_without_a_rotation_no_second_pass_is_counted():
    plain = Layer(8, 64, block=None)
    assert plain.rotation_bytes == 0
    assert model.linear(plain, 3, scratch=True) == (model.dequantize(plain), model.gemm(plain, 3))
    assert len(model.linear_backward(plain, 3, scratch=False)) == 1


@pytest.mark.parametrize(("terms", "products"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 3), (8, 6)])
def test_cayley_by_hand(terms, products):
    # 2 blocks of 16: v has 2 * 120 float32 entries, D 2 * 256 of 2 bytes, one product is 2 * 16^3 operations.
    layer = Layer(8, 32, block=16)
    assert model.cayley(layer, terms) == Cost(240 * 4 + 1024, 2 * 8192 * products)
    assert model.cayley_backward(layer, terms) == Cost(512 * 4 + 2 * 240 * 4, 2 * 8192 * 3 * products)


def test_exact_cayley_by_hand():
    layer = Layer(8, 32, block=16)
    assert model.cayley(layer, None).operations == pytest.approx(2 * (8 / 3) * 16**3)
    assert model.cayley_backward(layer, None).operations == pytest.approx(2 * (8 / 3 + 4) * 16**3)


def test_seconds_are_the_slower_limit_of_each_pass():
    assert predicted_seconds(Cost(10, 10), bandwidth=5, rate=2) == 5
    assert predicted_seconds(Cost(10, 10), bandwidth=2, rate=5) == 5
    slow_memory, slow_arithmetic = Cost(20, 1), Cost(1, 30)
    assert predicted_seconds((slow_memory, slow_arithmetic), bandwidth=1, rate=1) == 50
    assert predicted_seconds(slow_memory + slow_arithmetic, bandwidth=1, rate=1) == 31
