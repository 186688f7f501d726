"""Trains a small Llama with transformers' Trainer, in one process or in those of `accelerate launch`.

Most of its HQQ layers are adapted; one in each decoder layer is not. The losses go to `--out`/losses.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/, as pytest has it

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from helpers import randomize
from peft import OFTConfig, get_peft_model
from small_llama import VOCABULARY, quantized_llama
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import hqq_oft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
STEPS, BATCH = 6, 4


def allow_fsdp_on_cpus() -> None:
    """accelerate uses FSDP only with accelerators: have it take these processes' CPUs for such."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1:
        allow_fsdp_on_cpus()
    hqq_oft.patch_peft()
    arguments = TrainingArguments(
        str(options.out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=world == 1,
        report_to=[],
        disable_tqdm=True,
    )
    # Other processes than the first have other weights, as where only the first reads them (`--only-first`).
    base = quantized_llama(seed=rank if options.only_first else 0)
    model = get_peft_model(base, OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS))
    randomize(model)
    tokens = torch.randint(0, VOCABULARY, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    if world > 1:
        assert trainer.is_fsdp_enabled
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    state = hqq_oft.full_adapter_state_dict(model)
    if rank == 0:
        model.save_pretrained(options.out, state_dict=state)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (options.out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, losses and adapter")
    parser.add_argument("--resume", type=Path, help="checkpoint of an earlier run")
    parser.add_argument("--only-first", action="store_true", help="only the first process has the weights")
    main(parser.parse_args())
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
