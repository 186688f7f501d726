"""Quantize a model with each solver: errors of its weights, drawn layer by layer, and what they do to its predictions.

python -m examples.solvers path/to/model text.txt --bits 4 3 2 --out solvers.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqq_oft
from hqq_oft.quant.solver import Solver


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of the next token at every position, in float32."""
    return model.eval()(input_ids=tokens).logits.float().log_softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a dense transformers model")
    parser.add_argument("texts", type=Path, nargs="+", help="what the models predict")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text, at most")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2], help="one panel each")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("solvers.png"))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [tokenizer(path.read_text("utf-8"), return_tensors="pt").input_ids for path in options.texts]
    texts = [tokens[:, : options.tokens] for tokens in texts]
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    expected = [log_probabilities(dense, tokens) for tokens in texts]

    figure, panels = pyplot.subplots(1, len(options.bits), figsize=(4 * len(options.bits), 3.4), squeeze=False)
    for panel, bits in zip(panels[0], options.bits, strict=True):
        for solver in get_args(Solver):
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            start = time.perf_counter()
            report = hqq_oft.quantize_model(model, nbits=bits, group_size=options.group_size, solver=solver)
            seconds, errors = time.perf_counter() - start, [100 * error for error in report.errors.values()]
            found = [log_probabilities(model, tokens) for tokens in texts]
            divergences = [
                float(nn.functional.kl_div(ours, truth, reduction="none", log_target=True).sum(dim=-1).mean())
                for ours, truth in zip(found, expected, strict=True)
            ]
            mean = statistics.fmean(errors)
            print(
                f"{bits:g} bits, {solver}: {len(errors)} layers in {seconds:.1f} s, mean error of a weight {mean:.2f}%,"
                f" divergence from the dense model {', '.join(f'{nats:.3f}' for nats in divergences)} nats per token",
                flush=True,
            )
            panel.plot(errors, ".", markersize=4, label=f"{solver}, mean {mean:.2f}%")
        panel.set(title=f"{bits:g} bits, group {options.group_size}", xlabel="layer", ylim=(0, None))
        panel.legend(loc="lower right")
    panels[0, 0].set_ylabel("relative error of the weight, %")
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
