"""Making an `HqqOFTLinear`: settings, their errors, dispatch."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    hqq_layer,
    oft_layer,
)
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import OFTConfig
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from hqq_oft import HqqOFTLinear, dispatch_hqq


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
    assert list(layer.oft_R) == ["default"]


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
