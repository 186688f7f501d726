"""Serve one HQQ-quantized language model with several OFT adapters: each prompt names its adapter.

    python examples/serve.py --model path/to/model --adapter chat=adapters/chat --adapter code=adapters/code \
        --prompt chat "Tell me" --prompt code "def add" --prompt base "Once upon a time"

`base` is the model without an adapter. All prompts go through the model in one batch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel
from quantized import load
from transformers import AutoTokenizer

import hqq_oft


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--prompt", action="append", nargs=2, required=True, metavar=("NAME", "TEXT"))
    parser.add_argument("--bits", type=int, default=4, choices=[8, 4, 3, 2, 1], help="bits per weight (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt (default 64)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options = parser.parse_args()
    options.adapter = dict(pair.partition("=")[::2] for pair in options.adapter)
    unknown = {name for name, _ in options.prompt} - {*options.adapter, "base"}
    if unknown:
        parser.error(f"unknown adapters {', '.join(sorted(unknown))}; use base, {', '.join(options.adapter)}")
    return options


def main() -> None:
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = load(options.model, options.bits, torch.bfloat16 if options.bf16 else torch.float32, options.device)
    hqq_oft.patch_peft()
    (first, folder), *others = options.adapter.items()
    model = PeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.eval()

    names = ["__base__" if name == "base" else name for name, _ in options.prompt]
    batch = tokenizer([text for _, text in options.prompt], return_tensors="pt", padding=True).to(options.device)
    start = time.perf_counter()
    out = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        adapter_names=names,
        max_new_tokens=options.tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    for (name, prompt), text in zip(options.prompt, texts, strict=True):
        print(f"[{name}] {prompt!r} -> {text!r}")
    made = out.shape[1] - batch.input_ids.shape[1]
    print(f"{len(texts)} x {made} tokens in {seconds:.1f} s")


if __name__ == "__main__":
    main()
