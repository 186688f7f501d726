"""Merging band by band gives the bytes of merging at once, without the dense weight in memory."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from helpers import add_adapter, oft_layer, packed_bytes, same_bytes
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hqq_oft import backend
from hqq_oft.ops import table as ops
from hqq_oft.ops.packing import pack, set_rows, unpack, unpack_rows
from hqq_oft.quant import bands

BITS = [8, 6, 4, 3, 2, 1.58, 1]


@pytest.fixture
def small_bands(monkeypatch):
    """Bands of few rows; the number of those that were quantized, the repeated ones included."""
    computed, quantize_band = [], ops.quantize_band
    monkeypatch.setattr(bands, "ELEMENTS", 1500)

    def counted(*args):
        computed.append(args)
        return quantize_band(*args)

    monkeypatch.setattr(ops, "quantize_band", counted)
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
        patch.setattr(bands, "ELEMENTS", 1 << 40)
        layer.merge(**arguments)
    merged = packed_bytes(layer.base_layer), layer.merge_error
    layer.unmerge()
    return merged


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
            assert same_bytes(layer.base_layer, expected)
            assert layer.merge_error == pytest.approx(error, rel=1e-6)
            layer.unmerge()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"group_size": 64, "k": 96}, 12),  # groups that span rows: two rows are three groups
        ({"group_size": None}, 27),
        ({"group_size": None, "axis": 0}, 0),  # one group of all rows
        ({"group_size": 48, "axis": 0, "k": 96}, 0),  # bands of columns would not be whole rows
        ({"group_size": 64, "view_as_float": True}, 27),
        ({"group_size": 64, "quant_zero": True}, 0),
    ],
    ids=str,
)
def test_layouts(monkeypatch, small_bands, settings, count):
    layer = adapted_layer(**settings)
    expected, _ = merged_at_once(monkeypatch, layer)
    layer.merge()
    assert len(small_bands) >= count
    assert bool(small_bands) is bool(count)
    assert same_bytes(layer.base_layer, expected)


class Largest(TorchDispatchMode):
    """The most bytes of tensors alive at a time that were made in it; tensors that share memory count once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        address = storage._cdata
        if address in self.alive:
            return
        self.alive[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, address)

    def forget(self, address):
        self.now -= self.alive.pop(address, 0)
