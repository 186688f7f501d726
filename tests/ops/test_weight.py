"""`QuantizedWeight` reads every form in which HQQ stores a weight, and says why it can't read the rest."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from helpers import TOLERANCE, hqq_layer, relative_error
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn

from hqq_oft import QuantizedWeight, functional

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


@pytest.mark.parametrize(("nbits", "axis"), list(itertools.product(BITS, (0, 1))))
@pytest.mark.parametrize("group_size", [8, 64, 128, None])
def test_dequantize_agrees_with_the_oracle_and_with_hqq(nbits, axis, group_size):
    base = hqq_layer(64, 192, nbits=nbits, axis=axis, group_size=group_size)
    weight = QuantizedWeight.from_hqq(base)
    out = functional.dequantize(weight)
    assert out.shape == (64, 192)
    assert relative_error(out, oracle.of_layer(base)) <= 1e-6
    assert torch.equal(out, base.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [4, 3, 2])
def test_half_precision_is_at_least_as_accurate_as_hqq(dtype, nbits):
    base = hqq_layer(64, 192, nbits=nbits, group_size=64, dtype=dtype)
    truth = oracle.of_layer(base)
    ours = relative_error(functional.dequantize(QuantizedWeight.from_hqq(base)), truth)
    assert ours <= min(TOLERANCE[dtype], relative_error(base.dequantize(), truth))


def test_packed_levels_are_shared_not_copied():
    base = hqq_layer()
    weight = QuantizedWeight.from_hqq(base)
    assert weight.packed.data_ptr() == base.W_q.data_ptr()
    assert weight.scale.data_ptr() == base.meta["scale"].data_ptr()
    assert weight.shape == (64, 96)
    assert weight.device == base.W_q.device
    with pytest.raises(AttributeError):
        weight.bits = 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [4, 3])
def test_groups_may_span_rows(axis, nbits):
    base = hqq_layer(40, 48, nbits=nbits, group_size=64, axis=axis)  # 64 divides neither 40 nor 48
    assert relative_error(functional.dequantize(QuantizedWeight.from_hqq(base)), oracle.of_layer(base)) <= 1e-6


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_view_as_float(nbits):
    base = hqq_layer(64, 192, nbits=nbits, group_size=64, view_as_float=True, dtype=torch.float16)
    assert base.W_q.dtype == torch.float16
    assert relative_error(functional.dequantize(QuantizedWeight.from_hqq(base)), oracle.of_layer(base)) <= 1e-3


def test_rows_that_do_not_pack_are_refused_with_the_reason():
    # HQQ packs such a weight without an error, loses rows, and fails when dequantizing.
    packed, meta = Quantizer.quantize(torch.randn(9, 8), nbits=1, group_size=8, axis=1, device="cpu")
    with pytest.raises(ValueError, match="9 rows of levels cannot be packed 8 to a byte at 1 bits"):
        QuantizedWeight.from_parts(packed, meta)


def test_three_bit_rows_are_padded():
    packed, meta = Quantizer.quantize(torch.randn(7, 8), nbits=3, group_size=8, axis=1, device="cpu")
    out = functional.dequantize(QuantizedWeight.from_parts(packed, meta))
    truth = oracle.weight(packed, meta["scale"], meta["zero"], (7, 8), 3, 8, 1)
    assert packed.shape == (1, 8)
    assert relative_error(out, truth) <= 1e-6


def _quantized_meta_layer(**which):
    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1, **which)
    offload = config.pop("offload_meta")
    layer = HQQLinear(None, {**config, "offload_meta": offload}, compute_dtype=torch.float32, device="cpu")
    layer.quantize(torch.randn(128, 96), **config)
    return layer


@pytest.mark.parametrize(
    "which", [{"quant_zero": True}, {"quant_scale": True}, {"quant_zero": True, "quant_scale": True}]
)
def test_quantized_scale_and_zero(which):
    base = _quantized_meta_layer(**which)
    assert any(key in base.meta for key in ("zero_q", "scale_q"))
    out = functional.dequantize(QuantizedWeight.from_hqq(base))
    assert relative_error(out, base.dequantize()) <= 1e-6


@pytest.mark.parametrize("quantized", [False, True])
def test_offloaded_meta(quantized):
    # HQQ stacks scale and zero into pinned host memory, which it can't do here; the form is the same unpinned.
    base = _quantized_meta_layer(quant_zero=True, quant_scale=True) if quantized else hqq_layer()
    expected = base.dequantize()
    if quantized:
        # zero is quantized as a whole and scale in groups: two shapes; HQQ offloads only equal settings
        base.meta["zero_q"], base.meta["meta_zero"] = base.meta["scale_q"].clone(), dict(base.meta["meta_scale"])
        expected = base.dequantize()
        base.meta["zero_scale"] = torch.stack((base.meta.pop("zero_q"), base.meta.pop("scale_q")))
    else:
        base.meta["zero_scale"] = torch.stack((base.meta.pop("zero"), base.meta.pop("scale")))
    assert relative_error(functional.dequantize(QuantizedWeight.from_hqq(base)), expected) <= 1e-6


def test_unpacked_levels():
    packed, meta = Quantizer.quantize(torch.randn(16, 32), nbits=4, group_size=16, axis=1, bitpack=False, device="cpu")
    meta["compute_dtype"] = torch.float32
    out = functional.dequantize(QuantizedWeight.from_parts(packed, meta))
    assert relative_error(out, Quantizer.dequantize(packed, meta)) <= 1e-6


def test_one_scale_for_the_whole_tensor():
    packed, meta = Quantizer.quantize(
        torch.randn(16, 32), nbits=8, channel_wise=False, group_size=None, axis=1, device="cpu"
    )
    meta["compute_dtype"] = torch.float32
    out = functional.dequantize(QuantizedWeight.from_parts(packed, meta))
    assert relative_error(out, Quantizer.dequantize(packed, meta)) <= 1e-6


@pytest.mark.parametrize(("n", "k", "nbits", "axis"), [(1, 64, 4, 0), (2, 32, 4, 0), (2, 32, 8, 1), (1, 64, 2, 0)])
def test_a_single_group(n, k, nbits, axis):
    base = hqq_layer(n, k, nbits=nbits, axis=axis, group_size=64)
    assert torch.equal(functional.dequantize(QuantizedWeight.from_hqq(base)), base.dequantize())


def test_an_object_that_is_not_an_hqq_layer_raises():
    with pytest.raises(
        TypeError, match=r"expected an hqq.core.quantize.HQQLinear, got Linear; quantize the layer first"
    ):
        QuantizedWeight.from_hqq(nn.Linear(4, 4))


def test_an_uninitialised_layer_raises():
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    base = HQQLinear(nn.Linear(32, 8), config, compute_dtype=torch.float32, device="cpu", initialize=False)
    with pytest.raises(ValueError, match="not initialised: it holds no packed weight"):
        QuantizedWeight.from_hqq(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits must be one of"),
        ({"axis": 2}, "axis must be 0 or 1"),
        ({"group_size": 7}, "group_size must divide the 256 elements"),
        ({"group_size": 0}, "group_size must divide"),
        ({"packed": torch.zeros(8, 8, dtype=torch.int32)}, "packed must be torch.uint8 for 4 bits"),
        ({"packed": torch.zeros(8, 8, dtype=torch.uint8)}, r"packed must have shape \(16, 8\)"),
        ({"scale": torch.zeros(31)}, r"scale must be a floating point tensor of shape \(32,\)"),
        ({"zero": torch.zeros(32, dtype=torch.int32)}, "zero must be a floating point tensor"),
    ],
)
def test_inconsistent_shapes_and_settings_raise(change, message):
    parts = {
        "packed": torch.zeros(16, 8, dtype=torch.uint8),
        "scale": torch.ones(32),
        "zero": torch.zeros(32),
        "out_features": 8,
        "in_features": 32,
        "bits": 4,
        "group_size": 8,
        "axis": 1,
    }
    QuantizedWeight(**parts)
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**{**parts, **change})


def test_missing_meta_data_raises():
    base = hqq_layer()
    del base.meta["zero"]
    with pytest.raises(ValueError, match="holds no zero"):
        QuantizedWeight.from_hqq(base)
    base = hqq_layer()
    base.meta["packing"] = "7bit"
    with pytest.raises(ValueError, match="packing must be one of"):
        QuantizedWeight.from_hqq(base)
