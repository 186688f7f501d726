"""The table's cases on layers small enough to run each in no time, and a run of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaConfig

from bench import report, run, table
from bench.cases import Shape
from bench.timing import Limits

LIMITS = Limits(bandwidth=1e10, rate=1e11)
SIZES = {4096: 512, 14336: 1024, 28672: 1536, 8192: 768, 1024: 256, 2816: 512, 4032: 576}
SMALL = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
REPLACED = {"config": LlamaConfig(**SMALL, num_hidden_layers=1, vocab_size=64), "decoded": 4, "layers": 1}


def shrunk(name, value):
    if isinstance(value, Shape):
        return Shape(SIZES[value.n], SIZES[value.k])
    if name == "k":
        return SIZES[value]
    if name == "m":
        return 1 if value == 1 else 16 if value <= 64 else 256
    if name == "adapters" and isinstance(value, tuple):
        return 2, (768, 1536)
    return REPLACED.get(name, value)


def cases(suite, device):
    found = {}
    for case in table.cases(suite, device):
        small = replace(case, parameters={name: shrunk(name, value) for name, value in case.parameters.items()})
        found.setdefault(small.name, small)
    return list(found.values())


def measure(todo, folder):
    """What failed, and the rows; a report of them is in the folder."""
    folder.mkdir(exist_ok=True)
    session = run.Session(torch.device("cpu"), LIMITS, 0.0, 1, identity={"device": "here"})
    failed = run.measure(todo, session, folder / run.RAW)
    facts = dict.fromkeys(("torch", "triton", "peft", "hqq", "transformers", "python", "threads"), "1")
    facts |= {
        "device": "here",
        "kind": "cpu",
        "commit": "",
        "sources": "",
        "bandwidth_gb_per_s": 1.0,
        "rate_tflops": 1.0,
    }
    (folder / "environment.json").write_text(run.json.dumps(facts))
    report.write(folder)
    return failed, run.read_rows(folder / run.RAW)
