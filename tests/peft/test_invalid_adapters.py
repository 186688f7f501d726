"""Adapters, settings and models that do not belong together: the error, and that nothing has changed."""

from __future__ import annotations

import pytest
import torch
from helpers import adapted, add_adapter, oft_layer, packed_bytes, same_bytes
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_llama import quantized_llama, small_llama

import hqq_oft
from hqq_oft import HqqOFTLinear


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield


def test_loading_an_adapter_of_another_width_raises(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: torch.zeros(6, 28) for name in load_file(path)}, path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*oft_R.*weight"):
        PeftModel.from_pretrained(quantized_llama(), tmp_path)


def test_loading_an_adapter_of_another_block_size_raises_and_changes_nothing(tmp_path):
    adapted(oft_block_size=4).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"oft_block_size": 4', '"oft_block_size": 8')
    )
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "other")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_target_modules_missing_from_the_model_raise():
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found"):
        adapted(target_modules=["nowhere"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "oft_block_size"),
        ({"module_dropout": -0.1}, "module_dropout must be between 0 and 1, got -0.1"),
        ({"module_dropout": float("nan")}, "module_dropout must be between 0 and 1, got nan"),
        ({"coft": True, "eps": -1.0}, "eps must be positive with coft=True, got -1.0"),
        ({"coft": True, "eps": float("nan")}, "eps must be positive with coft=True, got nan"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": -3}, "num_cayley_neumann_terms must be at least 1"),
    ],
)
def test_invalid_configurations_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(**settings)


def test_switching_to_an_unknown_adapter_raises():
    model = adapted()
    with pytest.raises(ValueError, match="Adapter other not found"):
        model.set_adapter("other")
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("model", [small_llama, lambda: None])
def test_models_without_layers_have_nothing_to_share_or_gather(model):
    model = model() or torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the model has no HqqOFTLinear or OFTLinear layer"):
        hqq_oft.share_rotations(model)
    with pytest.raises(ValueError, match="the model has no adapter 'default'"):
        hqq_oft.full_adapter_state_dict(model)


def test_a_non_finite_adapter_does_not_affect_the_others():
    layer = oft_layer(adapter="good").eval()
    add_adapter(layer, "broken")
    x, pristine = torch.randn(2, 96), packed_bytes(layer.base_layer)
    with torch.no_grad():
        expected = layer(x)
        layer.oft_R["broken"].weight[0, 0] = float("nan")
        mixed = layer(x, adapter_names=["good", "broken"])
        assert torch.isfinite(mixed[0]).all()
        assert not torch.isfinite(mixed[1]).any()
        layer.set_adapter(["good", "broken"])
        with pytest.raises(ValueError, match="the adapter 'broken' seems to be broken"):
            layer.merge(safe_merge=True)
        layer.set_adapter("good")
        assert torch.equal(layer(x), expected)
    assert same_bytes(layer.base_layer, pristine)
    assert isinstance(layer, HqqOFTLinear)
