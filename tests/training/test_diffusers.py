"""A diffusers transformer: quantized, adapted with diffusers' `add_adapter`, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import layers
from peft import OFTConfig, get_peft_model_state_dict, set_peft_model_state_dict

import hqq_oft

CONFIG = OFTConfig(r=0, oft_block_size=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def quantized(seed=0, **settings):
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    hqq_oft.quantize_model(model, group_size=16, progress=False, **settings)
    return model.eval()


def denoise(model):
    draw = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 16, 16, generator=draw),
        encoder_hidden_states=torch.randn(1, 4, 32, generator=draw),
        pooled_projections=torch.randn(1, 32, generator=draw),
        timestep=torch.tensor([1.0]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample


def test_add_adapter_trains_is_fused_and_unloaded(patched):
    model = quantized()
    before = denoise(model)
    model.add_adapter(CONFIG)
    assert len(layers(model)) == 7
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (denoise(model) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        adapted = denoise(model)
        model.disable_adapters()
        assert torch.equal(denoise(model), before)
        model.enable_adapters()
        assert torch.equal(denoise(model), adapted)

        fresh = quantized()
        fresh.add_adapter(CONFIG)
        set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
        assert torch.equal(denoise(fresh), adapted)

        model.fuse_lora()
        assert all(layer.merged for layer in layers(model))
        assert (denoise(model) - adapted).norm() < 0.1 * (adapted - before).norm()
        model.unfuse_lora()
        assert torch.equal(denoise(model), adapted)
        model.unload_lora()
        assert not layers(model)
        assert torch.equal(denoise(model), before)


def test_a_saved_model_is_loaded_exactly(tmp_path):
    model = quantized(overrides={"proj_out": {"nbits": 8}}, skip_modules=["x_embedder"])
    hqq_oft.save_quantized(model, tmp_path / "saved", max_shard_size="50kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    loaded = hqq_oft.load_quantized(tmp_path / "saved", progress=False)
    assert type(loaded) is FluxTransformer2DModel
    assert loaded.to_json_string() == model.to_json_string()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(denoise(loaded), denoise(model))
    half = hqq_oft.load_quantized(tmp_path / "saved", compute_dtype=torch.bfloat16, progress=False)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"_class_name": "os"}, ValueError, "'os' is not a model class of diffusers"),
        ({"_class_name": "FluxPipeline"}, ValueError, "not a model class of diffusers"),
        ({"num_layers": 10**9}, hqq_oft.CheckpointError, "num_layers is 1000000000, more than"),
        ({"num_layers": 2}, hqq_oft.CheckpointError, "transformer_blocks.1.*missing"),
        ({"patch_size": "no"}, hqq_oft.CheckpointError, "not a valid configuration of FluxTransformer2DModel"),
    ],
)
def test_an_invalid_configuration_is_refused(tmp_path, changes, error, message):
    hqq_oft.save_quantized(quantized(), tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=message):
        hqq_oft.load_quantized(tmp_path / "saved", progress=False)
