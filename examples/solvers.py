"""Quantize a model with each solver, and draw the error of every layer's weight.

python -m examples.solvers path/to/model --bits 4 3 2 --out solvers.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import get_args

import torch
from matplotlib import pyplot
from transformers import AutoModelForCausalLM

import hqq_oft
from hqq_oft.quant.solver import Solver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a dense transformers model")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2], help="one panel each")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("solvers.png"))
    options = parser.parse_args()

    figure, panels = pyplot.subplots(1, len(options.bits), figsize=(4 * len(options.bits), 3.4), squeeze=False)
    for panel, bits in zip(panels[0], options.bits, strict=True):
        for solver in get_args(Solver):
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
            start = time.perf_counter()
            report = hqq_oft.quantize_model(model, nbits=bits, group_size=options.group_size, solver=solver)
            seconds, errors = time.perf_counter() - start, [100 * error for error in report.errors.values()]
            mean = statistics.fmean(errors)
            print(f"{bits:g} bits, {solver}: {len(errors)} layers in {seconds:.1f} s, mean error {mean:.2f}%")
            panel.plot(errors, ".", markersize=4, label=f"{solver}, mean {mean:.2f}%")
        panel.set(title=f"{bits:g} bits, group {options.group_size}", xlabel="layer", ylim=(0, None))
        panel.legend(loc="lower right")
    panels[0, 0].set_ylabel("relative error of the weight, %")
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
