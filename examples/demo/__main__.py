"""`python -m examples.demo`: the main job, from training a small model to merging and unmerging its adapter."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import OFTConfig, PeftModel, get_peft_model
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear, env

from . import corpus, model, report

OUT = Path("build/demo")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class CheckFailed(SystemExit):
    """A number is not what it should be: the message on stderr, exit status 1."""


def check(holds: bool, what: str) -> None:
    """Say on stdout that `what` holds, or stop the program."""
    if not holds:
        raise CheckFailed(f"FAILED: {what}")
    print(f"ok: {what}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="fine-tuning steps")
    parser.add_argument("--pretrain-steps", type=int, default=220, help="training steps of the dense model")
    parser.add_argument("--bits", type=float, default=4, choices=[8, 6, 5, 4, 3, 2, 1.58, 1], help="bits per level")
    parser.add_argument("--group-size", type=int, default=64, help="levels that share a scale; a multiple of 8")
    parser.add_argument("--block-size", type=int, default=32, help="OFT block size")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the dropout")
    parser.add_argument("--evaluation-batches", type=int, default=4, help="held-out batches per text")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results and the cached dense model")
    args = parser.parse_args()
    for name in ("steps", "pretrain_steps", "evaluation_batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    sizes = [model.LLAMA["hidden_size"] ** 2, model.LLAMA["hidden_size"] * model.LLAMA["intermediate_size"]]
    if args.group_size < 8 or any(size % args.group_size for size in sizes) or args.group_size % 8:
        parser.error(f"--group-size must be a multiple of 8 that divides {sizes}, got {args.group_size}")
    if args.block_size < 2:
        parser.error(f"--block-size must be at least 2, got {args.block_size}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used: {str(error).splitlines()[0]}")
    args.bits = int(args.bits) if args.bits == int(args.bits) else args.bits
    return args


def packed_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The packed weight of every HQQ layer, copied."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
    return {name: layer.W_q.detach().clone() for name, layer in layers.items()}


@torch.no_grad()
def copy_adapted_weights(adapted: PeftModel, dense: nn.Module) -> None:
    """Give the layers of `dense` the weights of the adapted ones, read off their forward, without any merging."""
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, HqqOFTLinear):
            weight = dense.get_submodule(name).weight
            weight.copy_(layer(torch.eye(layer.in_features, device=weight.device)).T)


def against_peft(adapted: PeftModel, batches: list[torch.Tensor], device: str) -> str:
    """How long a training step takes with our layers and with PEFT's own, which take turns on the same model."""
    ours: list[float] = []
    theirs: list[float] = []
    model.step_milliseconds(adapted, batches[:1], device)
    for batch in batches:
        ours += model.step_milliseconds(adapted, [batch], device)
        hqq_oft.revert(adapted)
        theirs += model.step_milliseconds(adapted, [batch], device)
        hqq_oft.convert(adapted)
    return compared(statistics.median(ours), statistics.median(theirs), "peft")


def compared(ours: float, theirs: float, package: str) -> str:
    """Two times in milliseconds in words."""
    times = f"{ours:.0f} ms with hqq-oft, {theirs:.0f} ms with {package} {version(package)}"
    return f"{times}: {theirs / ours:.3g} times as fast"


def quantize_by_hqq(dense: nn.Module, bits: float, group_size: int, device: str) -> None:
    """What HQQ computes for the same layers; the result is dropped."""
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    for name, linear in dense.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device=device, del_orig=False)


def run(args: argparse.Namespace) -> None:
    """The job; stops with an error at the first number that is not what it should be."""
    start, device = time.perf_counter(), args.device
    prose, code = corpus.prose(), corpus.code()
    held_out = {
        name: text.evaluation_batches(args.evaluation_batches, 16, 128)
        for name, text in (("prose", prose), ("code", code))
    }
    rows: list[report.Row] = []

    def measure(state: str, candidate: nn.Module, training: model.Run | None = None) -> torch.Tensor:
        begin = time.perf_counter()
        losses = {name: model.evaluate(candidate, batches, device) for name, batches in held_out.items()}
        step_ms = 1e3 * (time.perf_counter() - begin) / sum(map(len, held_out.values()))
        peak = report.peak_memory_mib(device)
        report.reset_peak_memory(device)
        training_ms = training.step_ms if training and not training.cached else None
        rows.append(report.Row(state, losses["prose"], losses["code"], step_ms, peak, training_ms))
        check(all(math.isfinite(loss) for loss in losses.values()), f"the losses of the {state} model are finite")
        return model.logits(candidate, held_out["code"][0], device)

    def quantized() -> nn.Module:
        dense, _ = model.trained_on_prose(prose, args.pretrain_steps, args.seed, args.out, device)
        return model.quantize(dense, args.bits, args.group_size, device)

    dense, dense_run = model.trained_on_prose(prose, args.pretrain_steps, args.seed, args.out, device)
    parameters = sum(p.numel() for p in dense.parameters())
    measure("dense", dense, dense_run)
    base = dense
    quantize_ms = model.milliseconds(lambda: model.quantize(base, args.bits, args.group_size, device), device)
    base_logits = measure("quantized", base)

    with hqq_oft.patch_peft():
        config = OFTConfig(
            r=0, oft_block_size=args.block_size, target_modules=TARGETS, module_dropout=0.05, use_cayley_neumann=True
        )
        adapted = get_peft_model(base, config)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(f"OFT trains {trainable:,} parameters of a model of {parameters:,}")
        adapter_run = model.train(adapted, code, args.steps, 1e-2, args.seed + 1, device, "fine-tune on code")
        comparison = against_peft(adapted, list(code.batches(4, model.BATCH, model.LENGTH, args.seed)), args.device)
        expected, packed = measure("adapted", adapted, adapter_run), packed_bytes(adapted)

        adapted.save_pretrained(args.out / "adapter")
        reloaded = PeftModel.from_pretrained(quantized(), args.out / "adapter").eval()
        same = torch.equal(measure("reloaded", reloaded), expected)
        check(same, "the reloaded adapter gives the same logits bit for bit")

        merge_ms = model.milliseconds(lambda: adapted.merge_adapter(safe_merge=True), device)
        merged = measure("merged", adapted)
        check(not torch.equal(merged, expected), "the merged model differs: its weights were quantized again")
        adapted.unmerge_adapter()
        same = torch.equal(measure("unmerged", adapted), expected)
        check(same, "the unmerged model gives the same logits bit for bit")
        restored = packed_bytes(adapted)
        same = restored.keys() == packed.keys() and all(torch.equal(restored[n], packed[n]) for n in packed)
        check(same, "the unmerged weights are the same bit for bit")

        # Quantizing may well undo a small adapter, so how near `merged` is to `expected` says nothing by itself.
        dense, _ = model.trained_on_prose(prose, args.pretrain_steps, args.seed, args.out, device)
        hqq_ms = model.milliseconds(lambda: quantize_by_hqq(dense, args.bits, args.group_size, device), device)
        copy_adapted_weights(adapted, dense)
        requantized = model.quantize(dense, args.bits, args.group_size, device)
        again = model.logits(requantized, held_out["code"][0], device)
        noise = (again - expected).norm()
        # rounding differs in what lies half-way between two levels
        same = (merged - again).norm() < 0.25 * noise
        check(bool(same), "the merged model is what quantizing the adapted weights gives")
        hqq_oft.revert(reloaded)
        peft_ms = model.milliseconds(reloaded.merge_adapter, device)

    losses = {row.state: row.code for row in rows}
    check(losses["adapted"] < losses["quantized"], "the adapter lowers the loss on code")
    check(losses["reloaded"] == losses["adapted"] == losses["unmerged"], "adapted, reloaded and unmerged losses agree")

    blocks = sorted({layer.oft_block_size["default"] for layer in adapted.modules() if isinstance(layer, HqqOFTLinear)})
    facts = {
        "settings": f"{args.bits} bits, group {args.group_size}, block {blocks}, {args.steps} steps, "
        f"seed {args.seed}, {device}, torch {torch.__version__}",
        "forward and backward": comparison,
        "quantizing": compared(quantize_ms, hqq_ms, "hqq"),
        "merging": compared(merge_ms, peft_ms, "peft"),
        "backend": env.serving("linear", torch.device(args.device))[0],
        "logits on code": f"moved {float((expected - base_logits).norm() / base_logits.norm()):.2%} by the adapter, "
        f"{float(noise / expected.norm()):.2%} by quantizing the merged weights",
        "dense model": "from the cache" if dense_run.cached else "trained in this run",
        "whole job": f"{time.perf_counter() - start:.0f} s after the imports",
    }
    report.write(args.out, rows, facts, {"dense": dense_run.losses, "adapter": adapter_run.losses})
    print(f"\n{report.table(rows, facts)}\n\nwritten to {args.out}: table.md, results.json, loss.png, adapter/")


if __name__ == "__main__":
    run(arguments())
