"""What the demo prints and writes: a table, a plot of the losses, the numbers as JSON."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Row:
    """One state of the model.

    Attributes:
        state: its name.
        losses: held-out loss on each text, in nats per token.
        evaluation_ms: mean time of one evaluation batch, in milliseconds.
        peak_mib: peak memory since the state before, in MiB.
        training_ms: median time of a training step on the way to this state, in milliseconds; None without training.
    """

    state: str
    losses: dict[str, float]
    evaluation_ms: float
    peak_mib: float
    training_ms: float | None = None


def reset_peak_memory(device: str) -> None:
    """Start a new measurement for `peak_memory_mib`, where the system can (Linux and CUDA)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: str) -> float:
    """Peak memory since the last reset, in MiB: of the device's allocator on a GPU, resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def table(rows: list[Row], facts: dict[str, str]) -> str:
    """A Markdown table of the states, and the facts below it."""
    texts = list(rows[0].losses)
    heads = ["model", *(f"loss on {text}" for text in texts), "training step", "evaluation step", "peak memory"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        losses = " | ".join(f"{row.losses[text]:.4f}" for text in texts)
        training = "" if row.training_ms is None else f"{row.training_ms:.0f} ms"
        lines.append(f"| {row.state} | {losses} | {training} | {row.evaluation_ms:.0f} ms | {row.peak_mib:.0f} MiB |")
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts.items())])


def dialogue(answers: dict[str, str]) -> str:
    """The question and its answers, as quotations in Markdown."""
    parts = [
        f"{name}:\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines()) for name, text in answers.items()
    ]
    return "\n\n".join(parts)


def plot(path: Path, training_losses: list[float], rows: list[Row], text: str) -> None:
    """The losses of the fine-tuning, with the held-out losses on the same text as levels."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2))
    axes.plot(training_losses, color="tab:orange", linewidth=1, label="training loss")
    held_out = {row.state: row.losses[text] for row in rows}
    for state, style in (("dense", "-."), ("quantized", ":"), ("adapted", "-"), ("merged", "--")):
        axes.axhline(held_out[state], color="black", linestyle=style, linewidth=1, label=f"{state}, held out")
    axes.set(title=f"OFT on the quantized model, trained on {text}", xlabel="step", ylabel="loss (nats per token)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(
    folder: Path, rows: list[Row], facts: dict[str, str], answers: dict[str, str], losses: list[float], text: str
) -> None:
    """`table.md`, `answers.md`, `results.json` and `loss.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(rows, facts) + "\n")
    (folder / "answers.md").write_text(dialogue(answers) + "\n")
    results = {"rows": [vars(row) for row in rows], "facts": facts, "answers": answers, "losses": losses}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(folder / "loss.png", losses, rows, text)
