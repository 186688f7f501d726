"""Trains a small Llama in the processes that torchrun starts, or in one: `train.py --mode fsdp --out FOLDER`.

The first process writes the loss of each step, over the batches of all processes, to FOLDER/losses.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/, as pytest has it

import pytest
import torch
import torch.distributed as dist
from helpers import layers, randomize
from peft import OFTConfig, PeftModel, get_peft_model
from small_llama import VOCABULARY, quantized_llama
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hqq_oft

STEPS, BATCH = 6, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(adapter: Path | None) -> PeftModel:
    base = quantized_llama()
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    config = OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=True)
    model = get_peft_model(base, config).train()
    randomize(model)
    return model


def shard(model: PeftModel) -> None:
    """A unit per decoder layer, packed weights included."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    for layer in layers(model):
        packed, v = layer.get_base_layer().W_q, layer.oft_R["default"].weight
        assert isinstance(packed, DTensor)
        assert packed.dtype == torch.uint8
        assert packed.to_local().shape[0] * dist.get_world_size() == packed.shape[0]
        assert isinstance(v, DTensor)
        assert v.to_local().shape[0] * dist.get_world_size() == v.shape[0]


def check_refusals(model: PeftModel) -> None:
    """Unsupported operations on a sharded model raise and change nothing."""
    before = [layer.get_base_layer().W_q for layer in layers(model)]
    with pytest.raises(ValueError, match="the packed weight is sharded across processes"):
        layers(model)[0](torch.ones(1, 32))
    with pytest.raises(ValueError, match="the adapter 'default' is sharded across processes"):
        model.merge_adapter()
    assert all(layer.get_base_layer().W_q is packed for layer, packed in zip(layers(model), before, strict=True))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int, world: int) -> list[float]:
    tokens = torch.randint(0, VOCABULARY, (STEPS, BATCH, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in steps:
        mine = tokens[step].chunk(world)[rank]
        loss = net(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def run(options: argparse.Namespace, rank: int, world: int) -> None:
    hqq_oft.patch_peft()
    model = build(options.resume)
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.share:
        hqq_oft.share_rotations(model)
    net: nn.Module = model
    if options.mode == "ddp":
        net = DistributedDataParallel(model)
    elif options.mode == "fsdp":
        shard(model)
        check_refusals(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = 0
    if options.resume is not None:
        saved = torch.load(options.resume / "optimizer.pt")
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=WHOLE)
        start = saved["step"]
    half = STEPS // 2
    losses = train(net, optimizer, range(start, half), rank, world)
    if options.resume is None:
        state = hqq_oft.full_adapter_state_dict(model)
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        if rank == 0:
            model.save_pretrained(options.out, state_dict=state)
            torch.save({"optimizer": optimizer_state, "step": half}, options.out / "optimizer.pt")
    losses += train(net, optimizer, range(max(start, half), STEPS), rank, world)
    if rank == 0:
        (options.out / "losses.json").write_text(json.dumps(losses))


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.mode == "single":
        run(options, 0, 1)
        return
    dist.init_process_group("gloo")
    # In a function of its own, so that what holds the group is gone before it: gloo's threads may hang otherwise.
    run(options, dist.get_rank(), dist.get_world_size())
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["single", "ddp", "fsdp"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the losses, adapter and optimizer")
    parser.add_argument("--resume", type=Path, help="folder that an earlier run wrote after half of the steps")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--share", action="store_true", help="share_rotations")
    main(parser.parse_args())
