"""Merging band by band gives the bytes of merging at once, without the dense weight in memory."""

from __future__ import annotations

import copy
import math
import warnings
import weakref

import pytest
import torch
from helpers import add_adapter, oft_layer, packed_bytes
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hqq_oft import QuantizedWeight, backend
from hqq_oft.ops import table as ops
from hqq_oft.ops.packing import pack, set_rows, unpack, unpack_rows
from hqq_oft.quant import bands, hqq_layer, quantizer

BITS = [8, 6, 4, 3, 2, 1.58, 1]


@pytest.fixture
def small_bands(monkeypatch):
    """Bands of few rows; the number of those that were quantized, the repeated ones included."""
    computed, original, by_bands = [], ops.quantize, bands.quantize
    monkeypatch.setattr(bands, "CPU_ELEMENTS", 1500)

    def counted(*args):
        computed.append(args)
        return original(*args)

    def quantize(*args):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "quantize", counted)
            return by_bands(*args)

    monkeypatch.setattr(bands, "quantize", quantize)
    return computed


def adapted_layer(k=128, **settings):
    """A layer `[320, k]` with two adapters."""
    config = BaseQuantizeConfig(**{"nbits": 4, "axis": 1, **settings})
    base = HQQLinear(nn.Linear(k, 320), config, compute_dtype=torch.float32, device="cpu")
    layer = oft_layer(base, oft_block_size=16)
    add_adapter(layer, "other", oft_block_size=32)
    layer.set_adapter(["default", "other"])
    return layer


def merged_at_once(monkeypatch, layer, **arguments):
    """The bytes and the error of a merge of the whole weight; the layer is unmerged again."""
    with monkeypatch.context() as patch:
        patch.setattr(bands, "CPU_ELEMENTS", 1 << 40)
        layer.merge(**arguments)
    merged = stored(layer), layer.merge_error
    layer.unmerge()
    return merged


def stored(layer):
    """Every stored tensor, as bytes."""
    return {name: tensor.view(torch.uint8) for name, tensor in packed_bytes(layer.base_layer).items()}


def assert_stored(layer, expected):
    found = stored(layer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", BITS)
def test_bands_give_the_bytes_of_the_whole(monkeypatch, small_bands, nbits, axis, name):
    with backend(name):
        layer = adapted_layer(nbits=nbits, axis=axis, group_size=40 if axis == 0 else 64)
        for into in (None, 8, 3, 1):
            expected, error = merged_at_once(monkeypatch, layer, into=into)
            assert not small_bands
            layer.merge(into=into, safe_merge=True)
            assert len(small_bands) >= (8 if axis == 0 else 27)
            small_bands.clear()
            assert_stored(layer, expected)
            assert layer.merge_error == pytest.approx(error, rel=1e-6)
            layer.unmerge()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"group_size": 64, "k": 160}, 32),  # groups that span rows: two rows are five groups
        ({"group_size": None}, 27),
        ({"group_size": None, "axis": 0}, 0),  # one group of all rows
        ({"group_size": 48, "axis": 0, "k": 96}, 0),  # bands of columns would not be whole rows
        ({"group_size": 64, "nbits": 3, "view_as_float": True}, 27),
    ],
    ids=str,
)
def test_layouts(monkeypatch, small_bands, settings, count):
    layer = adapted_layer(**settings)
    expected, _ = merged_at_once(monkeypatch, layer)
    layer.merge()
    assert len(small_bands) >= count
    assert bool(small_bands) is bool(count)
    assert_stored(layer, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"channel_wise": False},
        {"group_size": 32},
        {"axis": 0},
        {"zero_quant_params": {"nbits": 8, "group_size": 32, "channel_wise": True, "optimize": False}},
    ],
    ids=str,
)
def test_settings_that_bands_cannot_serve_give_the_state_of_the_dense_weight(small_bands, settings):
    weight = adapted_layer(group_size=64).base_layer
    source = bands.Bands(QuantizedWeight.from_hqq(weight), lambda band: ops.dequantize(band, torch.float32))
    config = hqq_layer.quantization_settings(weight)
    for name, value in settings.items():
        (config if name in config else config["weight_quant_params"])[name] = value
    expected, error = quantizer.quantize(source.dense(), config, torch.float32, "cpu")
    found, same_error = quantizer.quantize(source, config, torch.float32, "cpu")
    assert not small_bands
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.weight().zero, expected.weight().zero)
    assert same_error == error


def test_a_weight_that_is_not_finite_goes_to_hqq(small_bands):
    weight = adapted_layer(group_size=64).base_layer
    source = bands.Bands(QuantizedWeight.from_hqq(weight), lambda band: ops.dequantize(band, torch.float32) / 0)
    _, error = quantizer.quantize(source, hqq_layer.quantization_settings(weight), torch.float32, "cpu")
    assert small_bands
    assert math.isnan(error)


@pytest.mark.parametrize("action", ["merge more", "unmerge"])
def test_lossy_ways_are_banded_too(monkeypatch, small_bands, action):
    layer = adapted_layer(group_size=64)
    layer.keep_pristine = "none"

    def act(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(adapter_names=["default"])
            layer.merge() if action == "merge more" else layer.unmerge()

    other = copy.deepcopy(layer)
    with monkeypatch.context() as patch:
        patch.setattr(bands, "CPU_ELEMENTS", 1 << 40)
        act(other)
    assert not small_bands
    act(layer)
    assert len(small_bands) >= 54
    assert_stored(layer, stored(other))


def test_stacked_scale_and_zero(monkeypatch, small_bands):
    layer = adapted_layer(group_size=64)
    meta = layer.base_layer.meta
    meta["zero_scale"] = torch.stack([meta.pop("zero"), meta.pop("scale")])
    expected, _ = merged_at_once(monkeypatch, layer)
    layer.merge()
    assert "zero_scale" in layer.base_layer.meta
    assert len(small_bands) >= 27
    assert_stored(layer, expected)


def test_bands_that_would_stop_elsewhere_are_computed_again(monkeypatch, small_bands):
    """The solver stops by the errors of the whole weight, some bands by their own earlier or later."""
    layer = adapted_layer(group_size=64, nbits=2)
    expected, _ = merged_at_once(monkeypatch, layer)
    layer.merge()
    decided = {args[-1] is not None for args in small_bands}
    assert decided == {False, True}
    assert_stored(layer, expected)


def test_scale_and_zero_share_no_memory(small_bands):
    """Or safetensors would not save them."""
    layer = adapted_layer(group_size=64)
    layer.merge()
    meta = layer.base_layer.meta
    assert meta["scale"].untyped_storage().data_ptr() != meta["zero"].untyped_storage().data_ptr()


class Peak(TorchDispatchMode):
    """The most bytes, over all operations in it, of living tensors that were made in it; views count once."""

    def __init__(self, before):
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.storages, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.before:
                self.storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(tensor))
        alive = (next((ref() for ref in refs if ref() is not None), None) for refs in self.storages.values())
        self.bytes = max(self.bytes, sum(t.untyped_storage().nbytes() for t in alive if t is not None))
        return out


@pytest.mark.parametrize(("nbits", "axis"), [(4, 1), (3, 1), (8, 1), (4, 0)])
def test_a_merge_takes_the_memory_of_two_bands_and_of_the_packed_weight(monkeypatch, nbits, axis):
    monkeypatch.setattr(bands, "CPU_ELEMENTS", 1 << 14)
    layer = adapted_layer(group_size=64, k=512, nbits=nbits, axis=axis)
    base, band = layer.base_layer, (1 << 14 if axis == 1 else 64 * 512)
    state = [base.W_q, base.meta["scale"], base.meta["zero"]]
    packed, rotations = sum(tensor.nbytes for tensor in state), 4 * 512 * (16 + 32)
    with Peak([*state, *layer.oft_R.parameters()]) as peak:
        layer.merge()
    two_bands = 2 * 4 * band + band + (1 << 12)  # in float32, the levels, and errors
    assert packed + band < peak.bytes <= packed + rotations + two_bands
    assert two_bands < 4 * 320 * 512 / 2


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_rows_of_levels_are_read_and_set_in_place(bits):
    rows = 37 if bits == 3 else 40
    levels, others = (torch.randint(0, 2**bits, (rows, 5), dtype=torch.uint8) for _ in range(2))
    packed = pack(levels.float(), bits)
    for first, last in ((0, rows), (3, 4), (2, 17), (rows - 9, rows)):
        assert torch.equal(unpack_rows(packed, bits, first, last), levels[first:last].to(packed.dtype))
        set_rows(packed, bits, first, others[first:last])
        levels[first:last] = others[first:last]
        assert torch.equal(packed, pack(levels.float(), bits))
        assert torch.equal(unpack(packed, bits, rows), levels.to(packed.dtype))


def test_levels_that_cannot_be_packed_are_refused_before_anything_is_computed(small_bands):
    config = BaseQuantizeConfig(nbits=8, group_size=None, axis=1)
    layer = oft_layer(HQQLinear(nn.Linear(64, 37), config, compute_dtype=torch.float32, device="cpu"))
    with pytest.raises(ValueError, match="37 rows of levels cannot be packed 2 per byte; choose another group_size"):
        layer.merge(into=4)
    assert small_bands == []
    assert not layer.merged
