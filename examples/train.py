"""Fine-tune an HQQ-quantized language model with OFT and the transformers Trainer.

    python examples/train.py --model path/to/model --text notes.txt --out adapter
    accelerate launch --config_file examples/accelerate_cpu.yaml examples/train.py --model ... --text ... --out adapter

The model is a folder that `AutoModelForCausalLM` can load; the text is any UTF-8 file, whose last tenth is held out for
evaluation. The adapter written to `--out` loads with `PeftModel.from_pretrained`, with or without hqq_oft.
"""

from __future__ import annotations

import argparse
import gc
import math
from pathlib import Path

import torch
import torch.distributed as dist
from peft import OFTConfig, get_peft_model
from quantized import TARGETS, load
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

import hqq_oft


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the adapter")
    parser.add_argument("--bits", type=int, default=4, choices=[8, 4, 3, 2, 1], help="bits per weight (default 4)")
    parser.add_argument("--block-size", type=int, default=32, help="OFT block size (default 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample (default 256)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    parser.add_argument("--batch", type=int, default=4, help="samples per process and step (default 4)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step (default 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, slower")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 model and autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --out")
    return parser.parse_args()


def samples(tokens: Tensor, length: int) -> list[dict[str, Tensor]]:
    """Split the text into samples of `length` tokens, which are also the labels; an incomplete last one is dropped."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    options = arguments()
    set_seed(0)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    data = samples(tokens, options.length)
    held_out = max(1, len(data) // 10)
    if len(data) < 2:
        raise SystemExit(f"{options.text} gives {len(data)} sample(s) of {options.length} tokens; provide at least 2.")

    model = load(options.model, options.bits, dtype, options.device)
    hqq_oft.patch_peft()
    config = OFTConfig(
        r=0,
        oft_block_size=options.block_size,
        target_modules=TARGETS,
        use_cayley_neumann=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            gradient_checkpointing=options.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if options.checkpointing else None,
            learning_rate=options.lr,
            warmup_steps=max(1, options.steps // 20),
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            bf16=options.bf16,
            use_cpu=options.device == "cpu",
            logging_steps=max(1, options.steps // 20),
            save_steps=max(1, options.steps // 2),
            save_total_limit=1,
            data_seed=0,  # the same sample order for any number of processes
            ddp_find_unused_parameters=False,  # every step uses every adapter
            # Calling `trainer.evaluate()` before `trainer.train()` instead would disable gradient averaging.
            eval_on_start=True,
            report_to=[],
        ),
        train_dataset=data[:-held_out],
        eval_dataset=data[-held_out:],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    before = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(options.out))
    if trainer.is_world_process_zero():
        print(f"held-out loss {before:.4f} -> {after:.4f}, perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        # gloo's threads can hang or abort a process that exits while something still references the group.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
