"""Merging: merged output, preserved attributes, exact unmerging, and the state after failures."""

from __future__ import annotations

import itertools
import warnings

import oracle
import pytest
import torch
from helpers import add_adapter, hqq_layer, oft_layer, packed_bytes, relative_error, same_bytes
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear, Quantizer
from torch import nn

from hqq_oft import HqqOFTLinear, QuantizedWeight, functional
from hqq_oft.quant import hqq_layer as quant_layer
from hqq_oft.tuner import fold


def two_adapters(base=None, **settings):
    layer = oft_layer(base, "a", std=0.15, oft_block_size=8, **settings).eval()
    add_adapter(layer, "b", std=0.15, oft_block_size=3)  # blocks of 3 and more: rotations that do not commute
    layer.set_adapter(["a", "b"])
    return layer


def rotated_truth(layer, *adapters):
    """`W * (R_1 ... R_n)^T` in float64, of the layer's current weight."""
    weight = oracle.of_layer(layer.get_base_layer())
    for name in reversed(adapters):
        module = layer.oft_R[name]
        terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
        weight = weight @ oracle.rotation(module.weight.detach(), module.block_size, layer.in_features, terms).T
    return weight


# --- What the merged layer computes ----------------------------------------------------------------------------------


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


# --- What survives ---------------------------------------------------------------------------------------------------


def test_every_attribute_of_the_hqq_layer_survives():
    base = hqq_layer(dtype=torch.float16, view_as_float=True)
    base.name = "model.layers.0.q_proj"
    hooks = base.register_forward_hook(lambda module, args, out: None)
    layer = oft_layer(base)
    before = {key: value for key, value in vars(base).items() if key not in ("meta", "_parameters")}
    meta = {key: value for key, value in base.meta.items() if not isinstance(value, torch.Tensor)}
    tensors = {key: (t.dtype, t.shape, t.device) for key, t in packed_bytes(base).items()}
    bias = base.bias
    layer.merge()
    assert layer.base_layer is base
    assert base.bias is bias
    assert {key: value for key, value in vars(base).items() if key not in ("meta", "_parameters")} == before
    assert {key: value for key, value in base.meta.items() if not isinstance(value, torch.Tensor)} == meta
    assert {key: (t.dtype, t.shape, t.device) for key, t in packed_bytes(base).items()} == tensors
    assert isinstance(base.W_q, nn.Parameter)
    hooks.remove()


@pytest.mark.parametrize("backend", [HQQBackend.PYTORCH, HQQBackend.PYTORCH_FORWARD])
def test_the_hqq_backend_survives(backend):
    previous = HQQLinear.backend
    try:
        HQQLinear.set_backend(backend)
        layer = oft_layer()
        layer.merge()
        assert layer.base_layer.backend is backend
        assert layer(torch.randn(2, 96)).shape == (2, 64)
    finally:
        HQQLinear.set_backend(previous)


@pytest.mark.parametrize("form", ["plain", "one scale", "quantized scale and zero"])
def test_settings_are_read_from_the_meta_data_if_the_layer_lacks_them(form):
    config = BaseQuantizeConfig(nbits=8, group_size=16, quant_zero=form[0] == "q", quant_scale=form[0] == "q")
    config.pop("offload_meta")
    if form == "one scale":
        config["weight_quant_params"].update(channel_wise=False, group_size=None)
    base = HQQLinear(None, {**config, "offload_meta": False}, compute_dtype=torch.float32, device="cpu")
    base.quantize(torch.randn(64, 96), **config)
    base.quant_config = None
    layer = oft_layer(base)
    before, x = {key: (t.shape, t.dtype) for key, t in packed_bytes(base).items()}, torch.randn(3, 96)
    expected = layer(x)
    layer.merge()
    assert {key: (t.shape, t.dtype) for key, t in packed_bytes(base).items()} == before
    assert relative_error(layer(x), expected) <= 5e-2


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_a_layer_that_went_through_a_state_dict_merges_to_the_same_bytes(nbits, forgotten):
    layer = oft_layer(hqq_layer(nbits=nbits))
    layer.merge()
    expected, error = packed_bytes(layer.base_layer), layer.merge_error
    packing = layer.base_layer.meta["packing"]
    layer.unmerge()
    layer.load_state_dict(layer.state_dict())
    if forgotten:
        layer.base_layer.quant_config = None
    layer.merge()
    assert same_bytes(layer.base_layer, expected)
    assert layer.base_layer.meta["packing"] == packing
    assert layer.merge_error == error


@pytest.mark.parametrize("form", ["offloaded", "quantized"])
def test_deprecated_forms_merge_and_unmerge(form):
    if form == "offloaded":
        base = hqq_layer(nbits=8, group_size=8)
        base.meta["zero_scale"] = torch.stack((base.meta.pop("zero"), base.meta.pop("scale")))
        base.offload_meta = True
    else:
        config = BaseQuantizeConfig(nbits=8, group_size=8, quant_zero=True, quant_scale=True)
        config.pop("offload_meta")
        base = HQQLinear(None, {**config, "offload_meta": False}, compute_dtype=torch.float32, device="cpu")
        base.quantize(torch.randn(64, 96), **config)
    layer = oft_layer(base)
    before, x = packed_bytes(base), torch.randn(5, 96)
    expected = layer(x)
    layer.merge()
    assert base.meta.keys() >= ({"zero_scale"} if form == "offloaded" else {"zero_q", "scale_q"})
    assert packed_bytes(base).keys() == before.keys()
    assert relative_error(layer(x), expected) <= 2e-2
    layer.unmerge()
    assert same_bytes(base, before)


# --- What comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["device", "host"])
def test_unmerging_is_bit_exact_after_any_number_of_cycles(keep):
    layer = two_adapters()
    layer.keep_pristine = keep
    before, x = packed_bytes(layer.base_layer), torch.randn(3, 96)
    expected = layer(x)
    for names in (["a"], ["b"], None, ["a", "b"], ["b"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(adapter_names=names)
            layer.merge()
        layer.unmerge()
        assert layer.merged_adapters == []
        assert same_bytes(layer.base_layer, before)
        assert torch.equal(layer(x), expected)
        assert layer._pristine is None


@pytest.mark.parametrize(("keep", "moves"), [("device", []), ("host", ["cpu"]), ("none", [])])
def test_the_pristine_weight_is_kept_in_the_selected_place(monkeypatch, keep, moves):
    layer, moved = oft_layer(), []
    state = quant_layer.PackedState.of(layer.base_layer)
    monkeypatch.setattr(quant_layer.PackedState, "to", lambda self, device: moved.append(device) or self)
    layer.keep_pristine = keep
    assert layer._kept(state) is (None if keep == "none" else state)
    assert moved == moves


def test_an_unknown_place_for_the_pristine_weight_raises():
    layer = oft_layer()
    with pytest.raises(ValueError, match=r"keep_pristine must be one of \('device', 'host', 'none'\), got 'hsot'"):
        layer.keep_pristine = "hsot"
    assert layer.keep_pristine == "device"


def test_the_error_of_a_merge_is_reported():
    layer = oft_layer(hqq_layer(nbits=4))
    assert layer.merge_error is None
    truth = rotated_truth(layer, "default")
    layer.merge()
    assert abs(layer.merge_error - relative_error(oracle.of_layer(layer.base_layer), truth)) <= 1e-5
    layer.unmerge()
    assert layer.merge_error is None


def test_the_environment_sets_what_is_kept(monkeypatch):
    monkeypatch.setenv("HQQ_OFT_KEEP_PRISTINE", "none")
    assert oft_layer().keep_pristine == "none"
    monkeypatch.setenv("HQQ_OFT_KEEP_PRISTINE", "disk")
    with pytest.raises(ValueError, match="HQQ_OFT_KEEP_PRISTINE='disk' is not understood"):
        oft_layer()


@pytest.mark.parametrize("give_up", ["setting", "drop"])
@pytest.mark.parametrize("exact", [False, True])
def test_without_the_pristine_weight_unmerging_inverts_with_a_warning(give_up, exact):
    layer = two_adapters(hqq_layer(nbits=8, group_size=8), use_cayley_neumann=not exact)
    weight = oracle.of_layer(layer.base_layer)
    if give_up == "setting":
        layer.keep_pristine = "none"
    layer.merge()
    if give_up == "drop":
        layer.drop_pristine()
    with pytest.warns(UserWarning, match="Unmerging without the pristine weight"):
        layer.unmerge()
    assert not layer.merged
    # two roundings at 8 bits; the series' transpose instead of its inverse would be tens of percent off
    assert relative_error(oracle.of_layer(layer.base_layer), weight) <= 2e-2


def test_merging_a_second_adapter_without_the_pristine_weight_keeps_the_order():
    layer = two_adapters(hqq_layer(nbits=8, group_size=8))
    x = torch.randn(5, 96)
    expected = layer(x)
    layer.keep_pristine = "none"
    with pytest.warns(UserWarning, match="have no effect until"):
        layer.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="Merging more adapters without the pristine weight"):
        layer.merge(adapter_names=["a"])
    assert layer.merged_adapters == ["a", "b"]
    assert relative_error(layer(x), expected) <= 3e-2


def test_unmerging_when_nothing_is_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        oft_layer().unmerge()


# --- As in PEFT ------------------------------------------------------------------------------------------------------


def test_unknown_adapters_are_skipped():
    layer = two_adapters()
    before = packed_bytes(layer.base_layer)
    layer.merge(adapter_names=["nobody"])
    assert not layer.merged
    assert same_bytes(layer.base_layer, before)
    with pytest.warns(UserWarning, match=r"\['b'\] are not merged"):
        layer.merge(adapter_names=["nobody", "a", "a"])
    assert layer.merged_adapters == ["a"]


def test_merging_again_warns_and_changes_nothing():
    layer = two_adapters()
    layer.merge()
    state = packed_bytes(layer.base_layer)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layer.merge()
    assert same_bytes(layer.base_layer, state)


def test_names_as_a_string_are_refused():
    # a ValueError in PEFT up to 0.19
    with pytest.raises((TypeError, ValueError), match="adapter_names should be a list of strings, got 'a'"):
        two_adapters().merge(adapter_names="a")


def test_leaving_out_an_active_adapter_warns_with_its_name():
    layer = two_adapters()
    with pytest.warns(UserWarning, match=r"Merged \['a'\]; the active adapter\(s\) \['b'\] are not merged"):
        layer.merge(adapter_names=["a"])
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merging_ignores_dropout():
    layer = oft_layer(module_dropout=0.9)
    quiet = oft_layer()
    quiet.load_state_dict(layer.state_dict())
    layer.train().merge()
    quiet.merge()
    assert same_bytes(layer.base_layer, packed_bytes(quiet.base_layer))


def test_merging_below_another_tuner_layer_is_refused():
    inner = oft_layer()
    outer = HqqOFTLinear(inner, "outer", r=4)
    nn.init.normal_(outer.oft_R["outer"].weight, std=0.1)
    x = torch.randn(3, 96)
    rotated = x.double() @ oracle.rotation(outer.oft_R["outer"].weight.detach(), 24, 96, None)
    assert relative_error(outer(x), inner(rotated.float())) <= 1e-5
    with pytest.raises(ValueError, match="below a HqqOFTLinear"):
        outer.merge()


# --- What a failure leaves -------------------------------------------------------------------------------------------


def state_of(layer):
    return packed_bytes(layer.base_layer), list(layer.merged_adapters), layer._pristine


def assert_state(layer, state):
    assert same_bytes(layer.base_layer, state[0])
    assert layer.merged_adapters == state[1]
    assert layer._pristine is state[2]


@pytest.mark.parametrize("broken", ["a", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_names_the_broken_adapter_and_changes_nothing(broken, value):
    layer = two_adapters()
    with torch.no_grad():
        layer.oft_R[broken].weight[0, 0] = value
    state = state_of(layer)
    with pytest.raises(ValueError, match=f"the adapter '{broken}' seems to be broken"):
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_a_failed_second_merge_keeps_the_first():
    layer = two_adapters()
    with torch.no_grad():
        layer.oft_R["b"].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="have no effect"):
        layer.merge(adapter_names=["a"], safe_merge=True)
    state = state_of(layer)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'b' seems to be broken"):  # noqa: PT030
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_safe_merge_checks_the_quantized_weight(monkeypatch):
    layer = two_adapters()
    state = state_of(layer)
    original = quant_layer.requantize

    def overflowing(base, dense, into):
        made = original(base, dense, into)
        made.meta["scale"] = made.meta["scale"] * float("inf")
        return made

    monkeypatch.setattr(quant_layer, "requantize", overflowing)
    with pytest.raises(ValueError, match=r"after quantizing the weight merged with \['a', 'b'\]"):
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_safe_merge_of_a_finite_adapter_is_the_same_as_merge():
    one, other = two_adapters(), two_adapters()
    other.load_state_dict(one.state_dict())
    one.merge()
    other.merge(safe_merge=True)
    assert same_bytes(one.base_layer, packed_bytes(other.base_layer))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["quantizer", "rotation", "install", "after install"])
@pytest.mark.parametrize("action", ["merge", "merge more", "unmerge"])
def test_an_interrupt_anywhere_changes_nothing(monkeypatch, error, where, action):
    layer = two_adapters()
    if action != "merge":
        with pytest.warns(UserWarning, match="have no effect"):
            layer.merge(adapter_names=["a"])
    if action == "unmerge":
        layer.drop_pristine()  # so that it computes and quantizes too
    state, x = state_of(layer), torch.randn(2, 96)
    expected = layer(x)
    install = quant_layer.PackedState.install
    failures = iter([error])

    def fail(*args, **kwargs):
        raise error

    def failing_install(self, base):
        if where == "after install":
            install(self, base)
        if next(failures, None) is not None:
            base.W_q = nn.Parameter(torch.zeros(1), requires_grad=False)  # interrupted halfway
            raise error
        install(self, base)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "quantizer":
            patch.setattr(Quantizer, "quantize", fail)
        elif where == "rotation":
            patch.setattr(fold.ops, "dequantize_rotate" if action != "unmerge" else "dequantize", fail)
            patch.setattr(fold.ops, "rotate", fail)
        else:
            patch.setattr(quant_layer.PackedState, "install", failing_install)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            layer.unmerge() if action == "unmerge" else layer.merge()
    assert_state(layer, state)
    assert torch.equal(layer(x), expected)
