"""Quantize a model from a folder and train one adapter after the other on text: `train.py FOLDER --out NAME`.

FOLDER holds `model`, `prose.txt` and `code.txt`. Written to FOLDER/NAME: `base`, the quantized model; a folder for each
adapter; `facts.json` with losses and the logits of a probe. Under torchrun, the processes share the batches.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from common import ADAPTERS, TARGETS, folders, held_out_loss, logits, samples
from peft import OFTConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import hqq_oft

BATCH = 8  # samples of a step, over all processes


def config() -> OFTConfig:
    return OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=True, task_type="CAUSAL_LM")


def train(model: Any, data: Any, out: Path) -> list[float]:
    """Losses of the steps."""
    arguments = TrainingArguments(
        str(out / "checkpoints"),
        max_steps=12,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=0.02,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        data_seed=0,
        ddp_find_unused_parameters=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    folder, out = folders(__doc__)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).requires_grad_(False)
    texts = {name: samples(folder, name) for name in ADAPTERS}
    plain = {name: held_out_loss(model, held_out) for name, (_, held_out) in texts.items()}
    hqq_oft.quantize_model(model, nbits=4, group_size=64, device="cpu", progress=False)
    quantized = {name: held_out_loss(model, held_out) for name, (_, held_out) in texts.items()}
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        hqq_oft.save_quantized(model, out / "base")
    hqq_oft.patch_peft()
    first, *others = ADAPTERS
    model = get_peft_model(model, config(), adapter_name=first)
    for name in others:
        model.add_adapter(name, config())
    steps = {}
    for name, (data, _) in texts.items():
        model.set_adapter(name)
        steps[name] = train(model, data, out)
    if leads:
        model.save_pretrained(out)
        facts: dict[str, Any] = {"steps": steps, "plain": plain, "quantized": quantized, "adapted": {}, "logits": {}}
        for name, (_, held_out) in texts.items():
            model.set_adapter(name)
            facts["adapted"][name] = held_out_loss(model, held_out)
            facts["logits"][name] = logits(model, held_out).tolist()
        (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        # gloo's threads can hang or abort a process in which something still holds the group when it ends
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
