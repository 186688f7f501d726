"""`HqqOFTLinear` as a module: construction, forward in every mode, adapters, copies, devices."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import oracle
import pytest
import torch
from helpers import (
    COMPILE_BACKEND,
    TOLERANCE,
    add_adapter,
    hqq_layer,
    oft_layer,
    packed_bytes,
    relative_error,
    same_bytes,
)
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import OFTConfig
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from hqq_oft import HqqOFTLinear, QuantizedWeight, dispatch_hqq, frozen_rotations, functional
from hqq_oft.ops import table as ops

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def truth(layer: HqqOFTLinear, x: torch.Tensor, *adapters: str) -> torch.Tensor:
    """The layer's output in float64, by the oracle."""
    x = x.double()
    for name in adapters:
        module = layer.oft_R[name]
        terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
        stored = module.weight.shape[0]
        max_norm = module.eps / stored**0.5 if module.coft else None
        x = x @ oracle.rotation(module.weight.detach(), module.block_size, layer.in_features, terms, max_norm)
    base = layer.get_base_layer()
    y = x @ oracle.of_layer(base).T
    return y if base.bias is None else y + base.bias.double()


# --- Construction ----------------------------------------------------------------------------------------------------


def test_the_layer_is_a_module_and_a_peft_layer_with_peft_state_dict_keys():
    layer = HqqOFTLinear(hqq_layer(), "task", r=12)
    assert isinstance(layer, nn.Module)
    assert isinstance(layer, OFTLayer)
    assert "oft_R.task.weight" in layer.state_dict()
    assert layer.oft_R["task"].weight.shape == (12, 8 * 7 // 2)
    assert not layer.oft_R["task"].weight.any()
    assert (layer.r["task"], layer.oft_block_size["task"]) == (12, 8)
    assert layer.fan_in_fan_out is False
    assert repr(layer).startswith("oft.HqqOFTLinear(")


def test_the_defaults_are_those_documented():
    layer = HqqOFTLinear(hqq_layer(), "default")
    module = layer.oft_R["default"]
    assert (layer.r["default"], module.coft, module.eps, module.block_share) == (8, False, 6e-5, False)
    assert (module.use_cayley_neumann, module.num_cayley_neumann_terms) == (False, 5)
    assert isinstance(layer.oft_dropout["default"], nn.Identity)


@pytest.mark.parametrize("keyword", ["config", "oft_config"])
def test_a_config_takes_precedence_over_all_settings(keyword):
    config = OFTConfig(
        r=4, oft_block_size=0, module_dropout=0.25, coft=True, eps=0.1, block_share=True, num_cayley_neumann_terms=7
    )
    layer = HqqOFTLinear(hqq_layer(), "default", **{keyword: config})
    module = layer.oft_R["default"]
    assert (layer.r["default"], module.coft, module.eps, module.block_share) == (4, True, 0.1, True)
    assert (module.use_cayley_neumann, module.num_cayley_neumann_terms) == (True, 7)
    assert layer.oft_dropout["default"].p == 0.25
    assert module.weight.shape == (1, 24 * 23 // 2)


@pytest.mark.parametrize("init_weights", [True, False])
def test_initial_weights(init_weights):
    layer = HqqOFTLinear(hqq_layer(), "default", init_weights=init_weights)
    weight = layer.oft_R["default"].weight
    assert abs(weight.std().item() - (0.0 if init_weights else 0.1)) < 0.02


@pytest.mark.parametrize(
    ("settings", "name", "adjusted", "result"),
    [
        ({"r": 0, "oft_block_size": 33}, "oft_block_size", 32, (3, 32)),
        ({"r": 0, "oft_block_size": 1000}, "oft_block_size", 96, (1, 96)),
        ({"r": 5, "oft_block_size": 0}, "r", 4, (4, 24)),
    ],
)
def test_sizes_that_do_not_divide_are_adjusted_with_pefts_warning(settings, name, adjusted, result):
    given = settings["r"] or settings["oft_block_size"]
    with pytest.warns(UserWarning, match=rf"^Invalid `{name}` \({given}\)! Adjusted `{name}` to \({adjusted}\)\.$"):
        layer = HqqOFTLinear(hqq_layer(), "default", **settings)
    assert (layer.r["default"], layer.oft_block_size["default"]) == result


BAD_SETTINGS = [
    ({"r": 8, "oft_block_size": 8}, "give either `r`, the number of blocks, or `oft_block_size`"),
    ({"r": 0, "oft_block_size": 0}, "give either `r`"),
    ({"r": -1}, "give either `r`"),
    ({"module_dropout": 1.5}, "module_dropout must be between 0 and 1, got 1.5"),
    ({"init_weights": "gaussian"}, "Unknown initialization init_weights='gaussian'"),
    ({"init_weights": 1}, "Unknown initialization init_weights=1"),
    ({"coft": True, "eps": 0.0}, "eps must be positive"),
    ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms must be at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_out_of_range_are_refused_and_change_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        HqqOFTLinear(hqq_layer(), "default", **settings)
    layer = oft_layer()
    before = {key: value.clone() for key, value in layer.oft_R.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.update_layer("default", **{"r": 8, **settings})
    with pytest.raises(ValueError, match=message):
        layer.update_layer("second", **{"r": 8, **settings})
    after = layer.oft_R.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert layer._all_available_adapter_names() == ["default"]


def test_only_initialised_hqq_layers_are_accepted():
    with pytest.raises(TypeError, match=r"needs an hqq.core.quantize.HQQLinear, got Linear"):
        HqqOFTLinear(nn.Linear(8, 8), "default")
    empty = HQQLinear(
        nn.Linear(32, 8), BaseQuantizeConfig(group_size=32), compute_dtype=torch.float32, device="cpu", initialize=False
    )
    with pytest.raises(ValueError, match="not initialised"):
        HqqOFTLinear(empty, "default")


def test_dispatch():
    base = hqq_layer()
    assert dispatch_hqq(nn.Linear(4, 4), "default", r=2) is None
    for kwargs in (
        {"r": 4},
        {"config": OFTConfig(r=4, oft_block_size=0)},
        {"oft_config": OFTConfig(r=4, oft_block_size=0)},
    ):
        layer = dispatch_hqq(base, "default", **kwargs)
        assert isinstance(layer, HqqOFTLinear)
        assert layer.r["default"] == 4
    # PEFT up to 0.19 passes the config, its fields and more
    layer = dispatch_hqq(
        base, "default", r=4, oft_block_size=0, oft_config=OFTConfig(r=4, oft_block_size=0), fan_in_fan_out=False,
        loaded_in_8bit=False, device_map=None, init_weights=True,
    )  # fmt: skip
    assert layer.r["default"] == 4
    assert dispatch_hqq(layer, "default", r=2).get_base_layer() is base


# --- Forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "mixed"])
def test_the_output_has_the_dtype_of_the_input(compute, given, autocast, state):
    layer = oft_layer(hqq_layer(dtype=compute)).eval()
    x = torch.randn(4, 96).to(given)
    kwargs, adapters = {}, ["default"]
    if state == "merged":
        layer.merge()
        adapters = []
    elif state == "disabled":
        layer.enable_adapters(False)
        adapters = []
    elif state == "mixed":
        kwargs["adapter_names"] = ["default"] * 4
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = layer(x, **kwargs)
    assert out.dtype == given
    # HQQ's own product, in merged and disabled layers, rounds its weight several times in half precision
    slack = 3 if state in ("merged", "disabled") else 1
    tolerance = max(TOLERANCE[compute] * slack, TOLERANCE[given])
    assert relative_error(out, truth(layer, x.to(compute), *adapters)) <= tolerance


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(96),
        torch.randn(2, 3, 5, 96),
        torch.randn(0, 96),
        torch.randn(2, 0, 96),
        torch.randn(96, 7).T,
        torch.randn(7, 192)[:, ::2],
        torch.randn(1, 96).expand(5, 96),
    ],
    ids=["vector", "4d", "empty", "empty inside", "transposed", "strided", "expanded"],
)
@pytest.mark.parametrize("merged", [False, True])
def test_any_shape_and_strides(x, merged):
    layer = oft_layer().eval()
    if merged:
        layer.merge()
    out = layer(x)
    assert out.shape == (*x.shape[:-1], 64)
    assert relative_error(out, truth(layer, x, *([] if merged else ["default"]))) <= 1e-5


def test_bad_input_is_refused():
    layer = oft_layer()
    with pytest.raises(TypeError, match=r"must be a floating point tensor, got torch.int64"):
        layer(torch.zeros(2, 96, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have shape \[..., 96\], got \(2, 95\)"):
        layer(torch.zeros(2, 95))
    with pytest.raises(ValueError, match=r"got \(\)"):
        layer(torch.tensor(1.0))


def test_an_adapter_active_twice_applies_once():
    layer = oft_layer()
    x = torch.randn(3, 96)
    expected = layer(x)
    layer.set_adapter(["default", "default"])
    assert torch.equal(layer(x), expected)


def test_several_adapters_save_only_their_inputs_and_parameters():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        layer(torch.randn(5, 96))
    assert sorted(saved) == [(5, 96), (5, 96), (12, 28), (32, 3)]  # the inputs of both, and the parameters


def test_active_adapters_apply_in_order():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    x = torch.randn(4, 96)
    for order in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        layer.set_adapter(order)
        assert relative_error(layer(x), truth(layer, x, *order)) <= 1e-5
    assert relative_error(truth(layer, x, "a", "b"), truth(layer, x, "b", "a")) > 1e-2
    layer.set_adapter(["unknown"])
    assert relative_error(layer(x), truth(layer, x)) <= 1e-5


def test_every_active_adapter_gets_its_gradient():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    parameters = [layer.oft_R[name].weight for name in ("a", "b")]
    copies = [p.detach().double().requires_grad_() for p in parameters]
    x64 = x.detach().double().requires_grad_()
    y = x64
    for v, b in zip(copies, (8, 3), strict=True):
        y = y @ oracle.rotation(v, b, 96, None)
    (y @ oracle.of_layer(layer.base_layer).T + layer.base_layer.bias.double()).square().sum().backward()
    assert relative_error(x.grad, x64.grad) <= 1e-5
    for parameter, copied in zip(parameters, copies, strict=True):
        assert relative_error(parameter.grad, copied.grad) <= 1e-5


def test_disabled_adapters_give_the_base_output():
    layer = oft_layer()
    x = torch.randn(3, 96)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), layer.base_layer(x))


def test_disabling_while_merged_unmerges_bit_for_bit():
    layer = oft_layer()
    before, x = packed_bytes(layer.base_layer), torch.randn(3, 96)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged
    assert same_bytes(layer.base_layer, before)


def test_hooks_on_the_base_layer_run():
    layer = oft_layer()
    x, seen = torch.randn(3, 96), []
    expected = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert relative_error(layer(x), expected) <= 1e-6
    assert seen == [(3, 64)]
    handle.remove()
    layer.base_layer.forward = lambda x: torch.full((3, 64), 2.0)  # as accelerate does
    assert torch.equal(layer(x), torch.full((3, 64), 2.0))


def test_trainable_bias():
    base = hqq_layer()
    base.bias = nn.Parameter(base.bias.detach().clone())
    layer = oft_layer(base)
    layer(torch.randn(5, 96)).sum().backward()
    assert torch.equal(base.bias.grad, torch.full((64,), 5.0))


# --- Adapter names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 96), (5, 3, 96)])
def test_each_sample_gets_its_own_adapter(shape):
    layer = oft_layer(adapter="a").eval()
    add_adapter(layer, "b")
    add_adapter(layer, "c", oft_block_size=3)
    add_adapter(layer, "d", block_share=True)
    names = ["b", "__base__", "c", "a", "d"]
    x = torch.randn(shape)
    out = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        expected = truth(layer, x[row], *([] if name == "__base__" else [name]))
        assert relative_error(out[row], expected) <= 1e-5
    assert torch.equal(layer(x, adapter_names=["__base__"] * 5), layer.base_layer(x))
    assert relative_error(layer(x, adapter_names=["elsewhere"] * 5), layer.base_layer(x)) <= 1e-6


def test_mixed_batches_on_a_base_layer_with_hooks():
    layer = oft_layer(adapter="a").eval()
    add_adapter(layer, "b", oft_block_size=3)
    x, names = torch.randn(3, 96), ["b", "a", "__base__"]
    expected = layer(x, adapter_names=names)
    layer.base_layer.register_forward_pre_hook(lambda module, args: None)
    assert relative_error(layer(x, adapter_names=names), expected) <= 1e-6


def test_errors_of_adapter_names_are_those_of_pefts_lora():
    layer = oft_layer().eval()
    x = torch.randn(3, 96)
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 3 respectively"):
        layer(x, adapter_names=["default", "default"])
    layer.merge()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        layer(x, adapter_names=["default"] * 3)


def test_adapter_names_with_disabled_adapters_give_the_base():
    layer = oft_layer().eval()
    layer.enable_adapters(False)
    x = torch.randn(2, 96)
    assert torch.equal(layer(x, adapter_names=["default"] * 2), layer.base_layer(x))


# --- Module dropout --------------------------------------------------------------------------------------------------


def dropped_blocks(layer, adapter="default"):
    """Which blocks one forward leaves unrotated, read from the output for an identity input."""
    x = torch.eye(layer.in_features)
    weight = functional.dequantize(QuantizedWeight.from_hqq(layer.base_layer))
    rotated = torch.linalg.lstsq(
        weight, (layer(x) - (layer.base_layer.bias if layer.base_layer.bias is not None else 0)).T
    )
    block = layer.oft_block_size[adapter]
    same = (rotated.solution.T - x).reshape(-1, block, layer.in_features).abs().amax(dim=(1, 2)) < 1e-3
    return set(same.nonzero().flatten().tolist())


@pytest.mark.parametrize("block_share", [False, True])
def test_dropout_replaces_a_share_of_blocks_rounded_down_by_the_identity(block_share):
    base = hqq_layer(192, 96, nbits=8)  # more outputs than inputs, so that the rotated input can be read off
    layer = oft_layer(base, module_dropout=0.3, block_share=block_share, std=0.1)
    seen = [dropped_blocks(layer) for _ in range(12)]
    assert {len(blocks) for blocks in seen} == {3}  # floor(0.3 * 12)
    assert len(set().union(*seen)) > 6  # and not always the same
    layer.eval()
    assert dropped_blocks(layer) == set()


def test_dropout_is_per_adapter_and_reproducible():
    layer = oft_layer(hqq_layer(192, 96, nbits=8), module_dropout=0.5)
    add_adapter(layer, "other")
    layer.set_adapter("other")
    assert dropped_blocks(layer, "other") == set()
    layer.set_adapter("default")
    x = torch.randn(2, 96)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(("p", "dropped"), [(0.29, 29), (0.57, 57), (0.5, 50), (0.999, 99)])
def test_the_dropped_share_is_rounded_down_without_float_error(p, dropped):
    layer = oft_layer(hqq_layer(16, 400, group_size=16), oft_block_size=4, module_dropout=p)
    assert (~layer._dropout_keep("default")).sum() == dropped


def test_dropped_blocks_get_no_gradient():
    layer = oft_layer(module_dropout=0.5)
    layer(torch.randn(9, 96)).square().sum().backward()
    without = (layer.oft_R["default"].weight.grad.abs().amax(dim=1) == 0).sum().item()
    assert without == 6


def test_dropping_every_block_gives_the_base_output():
    layer = oft_layer(module_dropout=1.0)
    x = torch.randn(3, 96)
    assert relative_error(layer(x), layer.base_layer(x)) <= 1e-6


def test_checkpointing_repeats_the_same_dropout():
    layer = oft_layer(module_dropout=0.5, coft=True, eps=0.5)
    x = torch.randn(5, 96, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        out.square().sum().backward()
        grads.append(layer.oft_R["default"].weight.grad.clone())
    assert torch.equal(*grads)


# --- Constrained OFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_share", [False, True])
def test_coft_uses_projected_blocks_and_keeps_the_parameter_out_of_training(block_share):
    layer = oft_layer(coft=True, eps=0.2, block_share=block_share, std=0.5)
    weight, x = layer.oft_R["default"].weight, torch.randn(3, 96)
    stored, before = weight.shape[0], weight.detach().clone()
    layer.eval()
    expected = truth(layer, x, "default")  # the oracle projects
    assert relative_error(layer(x), expected) <= 1e-5
    layer.merge()
    layer.unmerge()
    layer.get_delta_weight("default")
    assert torch.equal(weight, before)
    layer.train()
    assert relative_error(layer(x), expected) <= 1e-5
    norms = (2 * weight.detach().square().sum(1)).sqrt()
    assert not torch.equal(weight, before)
    assert norms.max() <= 0.2 / stored**0.5 * (1 + 1e-5)


def test_coft_does_not_project_a_frozen_parameter_in_training_mode():
    layer = oft_layer(coft=True, eps=0.2, std=0.5)
    weight = layer.oft_R["default"].weight.requires_grad_(False)
    before, x = weight.clone(), torch.randn(3, 96)
    assert relative_error(layer(x), truth(layer, x, "default")) <= 1e-5
    assert torch.equal(weight, before)


def test_coft_allows_two_forwards_before_one_backward():
    layer = oft_layer(coft=True, eps=0.2, std=0.5)
    x = torch.randn(3, 96)
    (layer(x).sum() + layer(2 * x).sum()).backward()
    assert torch.isfinite(layer.oft_R["default"].weight.grad).all()


# --- Adapters --------------------------------------------------------------------------------------------------------


def test_adding_replacing_switching_and_deleting():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    assert layer.active_adapters == ["a"]
    assert layer.oft_R["a"].weight.requires_grad
    assert not layer.oft_R["b"].weight.requires_grad
    layer.set_adapter("b")
    assert (layer.oft_R["a"].weight.requires_grad, layer.oft_R["b"].weight.requires_grad) == (False, True)
    layer.set_adapter("b", inference_mode=True)
    assert not layer.oft_R["b"].weight.requires_grad
    layer.update_layer("b", r=4)
    assert (layer.r["b"], layer.oft_R["b"].weight.any().item()) == (4, False)
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted. Setting active adapter to a"):
        layer.delete_adapter("b")
    assert layer.active_adapters == ["a"]
    assert layer._all_available_adapter_names() == ["a"]
    layer.delete_adapter("a")
    assert layer.active_adapters == []
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merged_adapters_are_neither_deleted_nor_replaced():
    layer = oft_layer()
    layer.merge()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        layer.delete_adapter("default")
    with pytest.raises(ValueError, match="Cannot replace the adapter 'default' while it is merged"):
        layer.update_layer("default", r=4)
    layer.unmerge()
    layer.delete_adapter("default")


@pytest.mark.parametrize("form", ["keyword", "oft_config", "positional"])
def test_update_layer_takes_a_config_in_every_form_of_peft(form):
    layer, config = oft_layer(), OFTConfig(r=4, oft_block_size=0)
    if form == "positional":
        layer.update_layer("b", 8, config)
    else:
        layer.update_layer("b", 8, **{"config" if form == "keyword" else "oft_config": config})
    assert layer.r["b"] == 4


def test_scaling_is_refused_with_pefts_warning():
    layer = oft_layer()
    x = torch.randn(2, 96)
    expected = layer(x)
    with pytest.warns(UserWarning, match="Scaling operation for OFT not supported"):
        layer.scale_layer(2.0)
    with pytest.warns(UserWarning, match="Unscaling operation for OFT not supported"):
        layer.unscale_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("block_share", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_weight_is_the_dense_rotation(block_share, exact, dtype):
    layer = oft_layer(block_share=block_share, use_cayley_neumann=not exact)
    layer.oft_R["default"].to(dtype)
    delta = layer.get_delta_weight("default")
    rotation = oracle.rotation(layer.oft_R["default"].weight.detach(), 8, 96, None if exact else 5)
    assert (delta.shape, delta.dtype) == ((96, 96), dtype)
    assert relative_error(delta, rotation) <= TOLERANCE[dtype]


def test_only_get_delta_weight_builds_the_dense_rotation(monkeypatch):
    monkeypatch.setattr(torch, "block_diag", None)
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b")
    layer.set_adapter(["a", "b"])
    dispatch, seen = ops.dispatch, set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(
                tuple(t.shape[-2:]) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    def watched(*args):  # a custom operator hides its inner calls from an enclosing mode
        with Watch():
            return dispatch(*args)

    monkeypatch.setattr(ops, "dispatch", watched)
    with Watch():
        layer(torch.randn(3, 96)).sum().backward()
        layer.merge()
        layer.unmerge()
        layer.merge()
        layer.drop_pristine()
        layer.unmerge()
    assert (64, 96) in seen  # the weight: shows that the mode sees inside the operators
    assert (96, 96) not in seen


def test_requires_grad_skips_the_packed_weight():
    layer = oft_layer()
    assert layer.requires_grad_(False) is layer
    assert not any(p.requires_grad for p in layer.parameters())
    layer.requires_grad_(True)
    assert layer.oft_R["default"].weight.requires_grad
    assert not layer.base_layer.W_q.requires_grad


# --- Copies, files, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_equal(how, merged):
    layer = oft_layer().eval()  # its bias comes from a trainable layer: plain HQQ can't deepcopy that
    x, before = torch.randn(3, 96), packed_bytes(layer.base_layer)
    unmerged = layer(x)
    if merged:
        layer.merge()
    if how == "deepcopy":
        clone = copy.deepcopy(layer)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        clone = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(clone(x), layer(x))
    assert clone.merged_adapters == layer.merged_adapters
    if merged:
        clone.unmerge()
        assert same_bytes(clone.base_layer, before)
        assert torch.equal(clone(x), unmerged)
        assert layer.merged
    nn.init.zeros_(clone.oft_R["default"].weight)
    assert layer.oft_R["default"].weight.any()


def test_loading_a_base_weight_while_merged_raises():
    layer, other = oft_layer(), oft_layer()
    layer.merge()
    before = packed_bytes(layer.base_layer)
    with pytest.raises(ValueError, match=r"\['default'\] are merged into.*Unmerge first"):
        layer.load_state_dict(other.state_dict())
    assert same_bytes(layer.base_layer, before)
    adapters = {key: value for key, value in other.state_dict().items() if "oft_R" in key}
    layer.load_state_dict(adapters, strict=False)
    assert torch.equal(layer.oft_R["default"].weight, other.oft_R["default"].weight)
    layer.unmerge()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), other(x))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["loaded", "merged", "unmerged"])
def test_base_tensors_are_detached_and_not_inference_tensors_after_load_and_merge(how):
    layer = oft_layer()
    if how == "loaded":
        raw = hqq_layer()
        assert not raw.bias.is_leaf
        assert raw.meta["zero"].is_inference()
        state = {**layer.state_dict(), **{f"base_layer.{key}": value for key, value in raw.state_dict().items()}}
        layer.load_state_dict(state)
    else:
        with torch.inference_mode():
            layer.merge()
            if how == "unmerged":
                layer.drop_pristine()
                layer.unmerge()
    x = torch.randn(3, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not any(t.is_inference() for t in packed_bytes(layer.base_layer).values())
    assert not layer.base_layer.W_q.is_inference()
    torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_state_dict_round_trip():
    layer, other = oft_layer(), oft_layer()
    assert not torch.equal(layer.base_layer.W_q, other.base_layer.W_q)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
@pytest.mark.parametrize("view_as_float", [False, True])
def test_casting_casts_the_adapter_and_never_the_packed_weight(cast, view_as_float):
    layer = oft_layer(hqq_layer(dtype=torch.float16, view_as_float=view_as_float)).eval()
    before, x = packed_bytes(layer.base_layer), torch.randn(3, 96)
    expected = layer(x)
    assert getattr(layer, cast)() is layer
    assert layer.oft_R["default"].weight.dtype == getattr(torch, cast)
    # compare bytes: viewed as floats, some values are NaN
    now = packed_bytes(layer.base_layer)
    assert all(torch.equal(now[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
    assert relative_error(layer(x), expected) <= 6e-3


@pytest.mark.parametrize("merged", [False, True])
def test_moving_a_layer_moves_all_its_tensors(merged):
    layer = oft_layer()
    if merged:
        layer.merge()
    layer.to("meta")
    base = layer.base_layer
    tensors = [base.W_q, base.bias, base.meta["scale"], base.meta["zero"], layer.oft_R["default"].weight]
    if merged:
        tensors += [layer._pristine.packed, layer._pristine.meta["scale"]]
    assert {t.device.type for t in tensors} == {"meta"}
    assert base.device == "meta"
    assert layer(torch.empty(3, 96, device="meta")).shape == (3, 64)


@pytest.mark.parametrize("move", [lambda layer: layer.to("meta"), lambda layer: layer.half()])
def test_a_layer_made_without_a_device_moves_and_casts(move):
    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    layer = oft_layer(HQQLinear(nn.Linear(96, 64), config, compute_dtype=torch.float32, device=None))
    assert layer.base_layer.device is None
    assert move(layer) is layer
    base, adapter = layer.base_layer, layer.oft_R["default"].weight
    tensors = [base.W_q, base.bias, base.meta["scale"], base.meta["zero"]]
    assert {t.device for t in tensors} == {adapter.device}
    assert base.device == str(adapter.device)
    assert base.bias.dtype == base.meta["scale"].dtype == torch.float32


def test_a_new_adapter_is_created_on_the_device_of_the_packed_weight(monkeypatch):
    layer = oft_layer()
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(device))
    layer.update_layer("second", r=4)
    assert moved == [layer.base_layer.W_q.device]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()  # compilations of one function are counted across tests


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("state", ["train", "eval", "merged", "disabled", "autocast", "mixed"])
def test_compile_in_every_state(state):
    settings = {"module_dropout": 0.5, "coft": True, "eps": 0.5, "std": 0.2}
    layer = oft_layer(adapter="a", **settings)
    add_adapter(layer, "b", block_share=True)
    layer.set_adapter(["a", "b"])
    layer.train(state == "train")
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    compiled = torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)
    for rows in (4, 7, 1):
        x = torch.randn(rows, 96)
        kwargs = {"adapter_names": ["a", "b", "__base__", "a"][:rows]} if state == "mixed" and rows < 5 else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == "autocast"):
            outputs = []
            for module in (layer, compiled):
                torch.manual_seed(rows)
                outputs.append(module(x, **kwargs))
        if state == "train":  # random numbers differ under Inductor: only that it runs, and drops something
            assert not torch.equal(compiled(x), compiled(x))
        else:
            assert relative_error(outputs[1], outputs[0]) <= 1e-5


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_without_graph_breaks():
    layer = oft_layer(adapter="a", module_dropout=0.0)
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 96, requires_grad=True)
    grads = []
    for module in (layer, torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        module(x).square().sum().backward()
        grads.append([x.grad, layer.oft_R["a"].weight.grad.clone(), layer.oft_R["b"].weight.grad.clone()])
    for eager, compiled in zip(*grads, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


# --- Rotations kept in inference -------------------------------------------------------------------------------------


@pytest.fixture
def cayleys(monkeypatch):
    """The blocks of each `cayley` that runs."""
    dispatch, seen = ops.dispatch, []

    def counted(operation, *args):
        if operation == "cayley":
            seen.append(args[0].shape[0])
        return dispatch(operation, *args)

    monkeypatch.setattr(ops, "dispatch", counted)
    return seen


def two_adapters():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", block_share=True)
    layer.set_adapter(["a", "b"])
    return layer.eval()


@torch.no_grad()
def test_rotations_are_computed_once_in_inference(cayleys):
    layer, x = two_adapters(), torch.randn(2, 96)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert relative_error(first, truth(layer, x, "a", "b")) <= 1e-5
    assert cayleys == [12, 1]
    mixed = layer(x, adapter_names=["b", "a"])
    assert cayleys == [12, 1]  # the same rotations
    assert relative_error(mixed[1], truth(layer, x, "a")[1]) <= 1e-5


CHANGES = {
    "in place": lambda layer: layer.oft_R["a"].weight.mul_(2),
    "new data": lambda layer: setattr(layer.oft_R["a"].weight, "data", layer.oft_R["a"].weight * 2),
    "new parameter": lambda layer: setattr(layer.oft_R["a"], "weight", nn.Parameter(layer.oft_R["a"].weight * 2)),
    "loaded": lambda layer: layer.oft_R["a"].load_state_dict({"weight": layer.oft_R["a"].weight * 2}),
    "replaced": lambda layer: layer.update_layer("a", 0, oft_block_size=16, init_weights=False),
    "cast": lambda layer: layer.half(),
    "told": lambda layer: (layer.oft_R["a"].weight.data.mul_(2), layer.clear_rotations()),
    "trained and back": lambda layer: (layer.train(), layer.oft_R["a"].weight.data.mul_(2), layer.eval()),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_rotation_is_never_used(change):
    layer, x = two_adapters(), torch.randn(2, 96)
    layer(x)
    CHANGES[change](layer)
    assert relative_error(layer(x), truth(layer, x, "a", "b")) <= 1e-5


def test_rotations_are_not_cached_when_gradients_are_recorded(cayleys):
    layer, x = two_adapters(), torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    layer(x).sum().backward()
    assert len(layer._rotations) == 0
    assert x.grad is not None
    assert layer.oft_R["a"].weight.grad is not None


def test_cached_rotations_are_freed_and_not_copied():
    layer = two_adapters()
    with torch.no_grad():
        layer(torch.randn(2, 96))
    assert len(layer._rotations) == 2
    assert len(copy.deepcopy(layer)._rotations) == len(pickle.loads(pickle.dumps(layer))._rotations) == 0
    layer.delete_adapter("b")
    assert len(layer._rotations) == 1
    layer.train()
    assert len(layer._rotations) == 0


def test_rotations_cached_in_inference_mode_work_in_training(cayleys):
    layer, x = two_adapters(), torch.randn(2, 96)
    with torch.inference_mode():
        expected = layer(x)
        layer(x)
    assert cayleys == [12, 1]
    for name in ("a", "b"):
        layer.oft_R[name].weight.requires_grad_(False)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_mixed_batch_builds_its_stack_and_index_once(monkeypatch):
    layer, x = two_adapters(), torch.randn(4, 3, 96)
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: stacked.append(len(tensors)) or stack(tensors))
    batches = [["b", "a", "__base__", "a"], ["a", "a", "b", "b"]]
    for names in batches * 2:
        y = layer(x, adapter_names=names)
        for sample, name in enumerate(names):
            alone = layer.base_layer(x) if name == "__base__" else truth(layer, x.reshape(-1, 96), name).view(4, 3, -1)
            assert relative_error(y[sample], alone[sample]) <= 1e-5
    before = len(stacked)
    layer(x, adapter_names=batches[1])
    layer(x[:, :1], adapter_names=batches[1])
    assert len(stacked) == before
    layer.oft_R["a"].weight.mul_(0.5)
    y = layer(x, adapter_names=batches[1])
    assert len(stacked) == before + 1
    assert relative_error(y[0], truth(layer, x.reshape(-1, 96), "a").view(4, 3, -1)[0]) <= 1e-5


@torch.no_grad()
def test_frozen_rotations_keep_their_memory_addresses():
    layer, x = two_adapters(), torch.randn(2, 96)
    model = nn.ModuleList([layer])
    with frozen_rotations(model):
        expected = layer(x), layer(x, adapter_names=["a", "b"])
        kept = {id(entry[2]) for entry in layer._rotations._entries.values()}
        derived = {key: id(entry[1]) for key, entry in layer._rotations._derived.items()}
        layer(x, adapter_names=["b", "b"])
        assert derived.items() <= {key: id(entry[1]) for key, entry in layer._rotations._derived.items()}.items()
        model.eval()
        assert torch.equal(layer(x), expected[0])
        assert torch.equal(layer(x, adapter_names=["a", "b"]), expected[1])
        assert kept == {id(entry[2]) for entry in layer._rotations._entries.values()}
        for forbidden in (model.train, layer.clear_rotations, lambda: layer.delete_adapter("a"), layer.half):
            with pytest.raises(RuntimeError, match="rotations are frozen"):
                forbidden()
        with pytest.raises(RuntimeError, match="rotations are frozen"):
            layer.update_layer("a", 0, oft_block_size=16)
        assert list(layer.oft_R) == ["a", "b"]
        assert torch.equal(layer(x), expected[0])
        with pytest.raises(ValueError, match="already frozen"), frozen_rotations(model):
            pass
        layer.oft_R["a"].weight.mul_(2)
        with pytest.raises(RuntimeError, match="'a' has changed while its rotations were frozen"):
            layer(x)
    assert len(layer._rotations) == 0
    assert relative_error(layer(x), truth(layer, x, "a", "b")) <= 1e-5
    model.train()


def test_freezing_a_training_layer_or_a_model_without_layers_raises():
    with pytest.raises(ValueError, match="no HqqOFTLinear layer"), frozen_rotations(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"call `model.eval\(\)` first"), frozen_rotations(oft_layer()):
        pass


# --- Memory at full size ---------------------------------------------------------------------------------------------


def test_forward_saves_only_x_and_v_and_less_than_peft():
    """4096 tokens through a 4096x4096 bfloat16 layer, on meta tensors: this layer saves only x and v, PEFT more."""
    from peft.tuners.oft.layer import Linear as PeftLinear

    if "config" not in PeftLinear.__init__.__code__.co_varnames:
        pytest.skip("this PEFT's layer does not take HQQ layers")
    n = 4096
    base = hqq_layer(64, 64, group_size=64, dtype=torch.bfloat16, bias=False, optimize=False)
    base.W_q = nn.Parameter(torch.empty(n * n // 64 // 2, 64, dtype=torch.uint8, device="meta"), requires_grad=False)
    base.in_features = base.out_features = n
    base.device = "meta"
    groups = {name: torch.empty(n * n // 64, 1, dtype=torch.bfloat16, device="meta") for name in ("scale", "zero")}
    base.meta = {**base.meta, **groups, "shape": (n, n)}
    config = OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True)
    kept = {}
    for cls in (HqqOFTLinear, PeftLinear):
        layer = cls(base, "default", config=config, r=0).to("meta")
        x = torch.empty(n, n, dtype=torch.bfloat16, device="meta", requires_grad=True)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.__setitem__(id(t), t), t)[1], lambda t: t
        ):
            layer(x)
        kept[cls] = [t for t in saved.values() if t.shape != base.W_q.shape]
    v = layer.oft_R["default"].weight
    assert sorted((tuple(t.shape), t.dtype) for t in kept[HqqOFTLinear]) == sorted(
        [((n, n), torch.bfloat16), (tuple(v.shape), torch.float32)], key=str
    )
    size = {cls: sum(t.numel() * t.element_size() for t in tensors) for cls, tensors in kept.items()}
    assert size[HqqOFTLinear] < 1.01 * n * n * 2
    assert size[PeftLinear] > 3 * n * n * 2  # an fp32 copy of x and a rotated x besides
