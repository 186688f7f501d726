"""What a merged layer computes."""

from __future__ import annotations

import itertools
import warnings

import oracle
import pytest
import torch
from helpers import (
    hqq_layer,
    oft_layer,
    packed_bytes,
    relative_error,
    rotated_truth,
    same_bytes,
    two_adapters,
)
from hqq.core.quantize import HQQLinear

from hqq_oft import QuantizedWeight, functional


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_the_merged_weight_is_the_rotated_one_through_hqqs_quantizer(nbits, axis):
    base = hqq_layer(nbits=nbits, axis=axis)
    layer = oft_layer(base)
    truth = rotated_truth(layer, "default")
    expected = HQQLinear.from_weights(
        truth.float(), None, {**base.quant_config, "offload_meta": False}, torch.float32, "cpu"
    )
    layer.merge()
    merged, reference = functional.dequantize(QuantizedWeight.from_hqq(base)), expected.dequantize()
    # a weight halfway between two levels may round either way
    assert ((merged - reference).abs() > 1e-4).float().mean() <= 2e-3
    assert relative_error(merged, truth) <= 1.05 * relative_error(reference, truth)


def test_merging_at_eight_bits_gives_the_output_of_the_forward():
    layer = two_adapters(hqq_layer(nbits=8, group_size=8))
    x = torch.randn(5, 96)
    expected = layer(x)
    layer.merge()
    assert relative_error(layer(x), expected) <= 1e-2


@pytest.mark.parametrize("calls", [[["a", "b"]], [["a"], ["b"]], [["b"], ["a"]], [["b", "a"]], [None], [["b"], None]])
def test_several_adapters_merge_in_the_order_of_the_forward_however_they_are_called(calls):
    layer = two_adapters(hqq_layer(nbits=8, group_size=8))
    x = torch.randn(5, 96)
    expected = layer(x)
    layer.set_adapter(["b", "a"])
    wrong = layer(x)
    layer.set_adapter(["a", "b"])
    assert relative_error(wrong, expected) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for names in calls:
            layer.merge(adapter_names=names)
    assert layer.merged_adapters == ["a", "b"]
    assert relative_error(layer(x), expected) <= 1e-2


def test_inactive_adapters_merge_in_the_order_of_the_calls():
    layer = two_adapters(hqq_layer(nbits=8, group_size=8))
    x = torch.randn(5, 96)
    layer.set_adapter(["b", "a"])
    expected = layer(x)
    layer.set_adapter([])
    layer.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="Already following adapters were merged b"):
        layer.merge(adapter_names=["a"])
    assert layer.merged_adapters == ["b", "a"]
    assert relative_error(layer(x), expected) <= 1e-2


def test_merging_in_several_calls_quantizes_once():
    once, twice = two_adapters(), None
    twice = two_adapters()
    twice.load_state_dict(once.state_dict())
    once.merge()
    twice.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="You are now additionally merging a"):
        twice.merge(adapter_names=["a"])
    assert same_bytes(twice.base_layer, packed_bytes(once.base_layer))


def test_a_shared_block_and_every_half_dtype():
    for dtype, share in itertools.product((torch.float16, torch.bfloat16), (False, True)):
        layer = oft_layer(hqq_layer(nbits=8, group_size=8, dtype=dtype), block_share=share)
        x = torch.randn(5, 96).to(dtype)
        expected = layer(x)
        layer.merge()
        assert layer(x).dtype == dtype
        assert relative_error(layer(x), expected) <= 2e-2


def test_merging_in_half_precision_adds_no_error_beyond_quantization():
    base = hqq_layer(dtype=torch.bfloat16)
    layer = oft_layer(base)
    truth = rotated_truth(layer, "default")
    settings = {**base.quant_config, "offload_meta": False}
    direct = HQQLinear.from_weights(truth.float(), None, settings, torch.bfloat16, "cpu")
    layer.merge()
    assert relative_error(oracle.of_layer(base), truth) <= 1.02 * relative_error(oracle.of_layer(direct), truth)
