"""The whole job on tiny models of many architectures: quantize, save, load, adapt, train, generate, merge, unmerge.

Run by `make test-architectures`, not by `make test`; the table that it writes lists what each architecture keeps dense
and why.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from architectures.models import ARCHITECTURES, Architecture
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hqq_oft
from hqq_oft import HqqOFTLinear, OFTLinear, cli, load_quantized, quantize_model, save_quantized

GROUP_SIZE = 16


@pytest.fixture(autouse=True)
def patched():
    with hqq_oft.patch_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outputs(model: nn.Module, architecture: Architecture) -> Tensor:
    """The first floating-point output: logits or hidden states."""
    values = model(**architecture.inputs()).values()
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def evaluated(model: nn.Module, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        return outputs(model.eval(), architecture)


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Packed weight, scale and zero of every HQQ layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    return {
        f"{name}.{field}": tensor.clone()
        for name, layer in layers.items()
        for field, tensor in (("W_q", layer.W_q), ("scale", layer.meta["scale"]), ("zero", layer.meta["zero"]))
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_whole_job(architecture, tmp_path, record_property):
    if architecture.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.model_type}")
    model = architecture.model()
    model.save_pretrained(tmp_path / "dense")
    report = quantize_model(model, group_size=GROUP_SIZE, nbits=8, progress=False)
    assert report.quantized
    record_property("quantized", f"{len(report.quantized)} layers, {report.quantized_share:.0%} of the bytes")
    record_property("dense", "; ".join(sorted(set(report.kept.values()))))
    quantized = evaluated(model, architecture)
    expected = evaluated(dense_with_weights_of(model, architecture), architecture)
    assert (quantized - expected).norm() < 1e-4 * expected.norm()

    save_quantized(model, tmp_path / "quantized")
    assert torch.equal(evaluated(load_quantized(tmp_path / "quantized", progress=False), architecture), quantized)
    if int(transformers.__version__.split(".")[0]) >= 5:
        by_transformers = getattr(transformers, architecture.auto).from_pretrained(tmp_path / "quantized")
        assert torch.equal(evaluated(by_transformers, architecture), quantized)
    command = ["quantize", str(tmp_path / "dense"), str(tmp_path / "by-cli"), "--nbits=8", f"--group-size={GROUP_SIZE}"]
    assert cli.main([*command, "--quiet"]) == 0
    assert torch.equal(evaluated(load_quantized(tmp_path / "by-cli", progress=False), architecture), quantized)

    dense = dense_linear_layers(model)
    adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules="all-linear"))
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, OFTLayer)}
    assert sum(type(layer) is HqqOFTLinear for layer in layers.values()) == len(report.quantized)
    assert {name for name, layer in layers.items() if type(layer) is OFTLinear} == dense
    train_one_step(adapted, architecture)

    pristine, tuned = packed(adapted), evaluated(adapted, architecture)
    assert not torch.equal(tuned, quantized)
    if adapted.base_model.model.can_generate():
        inputs = {name: value for name, value in architecture.inputs().items() if name != "decoder_input_ids"}
        made = adapted.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert made.shape[0] == 2
    adapted.merge_adapter()
    assert max(adapted.base_model.merge_errors().values()) < 0.02
    assert not torch.equal(evaluated(adapted, architecture), tuned)
    adapted.unmerge_adapter()
    assert_same(packed(adapted), pristine)
    assert torch.equal(evaluated(adapted, architecture), tuned)

    adapted.save_pretrained(tmp_path / "adapter")
    command = ["merge", str(tmp_path / "quantized"), str(tmp_path / "adapter"), str(tmp_path / "merged-by-cli")]
    assert cli.main([*command, "--quiet"]) == 0
    merged = adapted.merge_and_unload()
    save_quantized(merged, tmp_path / "merged")
    expected = evaluated(merged, architecture)
    for folder in ("merged", "merged-by-cli"):
        assert torch.equal(evaluated(load_quantized(tmp_path / folder, progress=False), architecture), expected)


def dense_linear_layers(model: nn.Module) -> set[str]:
    """Names that the layers which "all-linear" adapts besides HQQ layers have in the adapted model."""
    output = model.get_output_embeddings()
    return {
        f"base_model.model.{name}"
        for name, module in model.named_modules()
        if (type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear") and module is not output
    }


def dense_with_weights_of(quantized: nn.Module, architecture: Architecture) -> nn.Module:
    """The model as transformers makes it, with the dequantized weights of `quantized`."""
    model = architecture.model()
    for name, layer in quantized.named_modules():
        if not isinstance(layer, HQQLinear):
            continue
        weight = layer.dequantize()
        try:
            module = model.get_submodule(name)
            module.weight.data = weight if isinstance(module, nn.Linear) else weight.T
        except AttributeError:
            parent, index, projection = name.rsplit(".", 2)
            experts = model.get_submodule(parent)
            getattr(experts, projection).data[int(index)] = weight.T if experts.is_transposed else weight
    return model


def train_one_step(adapted: nn.Module, architecture: Architecture) -> None:
    base = adapted.base_model.model
    if base.supports_gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    parameters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    torch.manual_seed(0)
    outputs(adapted, architecture).log_softmax(-1)[..., 1].mean().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    reached = [name for name, gradient in gradients.items() if gradient.abs().sum() > 0]
    assert len(reached) >= len(parameters) / 2  # not those of experts without a token
    for gradient in gradients.values():
        gradient.mul_(0.02 / gradient.norm().clamp_min(1e-30))  # a step of the same size for every layer
    optimizer.step()
    if base.supports_gradient_checkpointing:
        base.gradient_checkpointing_disable()
