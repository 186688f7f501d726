"""The whole check, its report and its record."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..ops.backends import BackendError, selected_backend
from ..ops.table import OPERATIONS
from ..ops.verified import UnverifiedKernels, identity, record_path
from .cases import DTYPES, TOKENS, Case, all_cases
from .measure import TOLERANCE, Outcome, Times, compile_kernels, measure, run_case, worst

_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        device: what was checked.
        identity: its name, driver and versions.
        selected: name of the selected backend.
        outcomes: of every case.
        times: by M.
        untimed: what timing raised.
        seconds: duration.
    """

    device: torch.device
    identity: dict[str, str]
    selected: str
    outcomes: list[Outcome]
    times: list[Times]
    untimed: list[str]
    seconds: float

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, one line each."""
        if all(outcome.backend == "none" and not outcome.fault for outcome in self.outcomes):
            return [f"nothing was checked: the {self.selected} backend supports no case"]
        return [f"{o.case.label}: {o.fault}" for o in self.outcomes if o.fault] + self.untimed

    def save(self) -> Path:
        """Write the record, which `auto` looks for before it uses kernels on a GPU.

        Raises:
            OSError: the cache folder cannot be written.
        """
        path = record_path(self.device, self.selected)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"identity": self.identity, "backend": self.selected, "seconds": self.seconds, "faults": self.faults}
        record |= {"times": [asdict(t) for t in self.times], "outcomes": [asdict(o) for o in self.outcomes]}
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(record, indent=1), "utf-8")
        unfinished.replace(path)
        return path

    def markdown(self) -> str:
        """The report as a text to paste into an issue."""
        faults, versions = self.faults, [f"{key} {value}" for key, value in self.identity.items() if key != "device"]
        versions += [f"Python {platform.python_version()}", platform.platform(), f"backend {self.selected}"]
        lines = [
            f"### hqq-oft check: {_count(len(faults), 'fault')} on {self.identity['device']}",
            "",
            f"{', '.join(versions)}; {_count(len(self.outcomes), 'case')} in {self.seconds:.0f} s.",
            "",
            "Largest relative error against float64, and its tolerance:",
            "",
            f"| operation | backend | cases | {' | '.join(f'{d} ≤ {TOLERANCE[t]:.0e}' for d, t in DTYPES.items())} | "
            "two runs | faults |",
            "|---|---|---|---|---|---|---|---|",
            *(self._row(name) for name in OPERATIONS),
        ]
        if self.times:
            lines += [
                "",
                "Median microseconds of a 4096x4096 layer at 4 bits, group 64, block 32, bf16; of a dense layer; of a "
                "copy of the packed weight:",
                "",
                "| M | linear | dense | linear_backward | dense | copy |",
                "|---|---|---|---|---|---|",
                *(f"| {' | '.join(f'{value:.0f}' for value in asdict(times).values())} |" for times in self.times),
            ]
        if faults:
            lines += ["", "Faults:", "", *(f"- {' '.join(fault.split())[:300]}" for fault in faults[:_SHOWN_FAULTS])]
        if len(faults) > _SHOWN_FAULTS:
            lines += [f"- and {len(faults) - _SHOWN_FAULTS} more, all in the record"]
        return "\n".join(lines)

    def _row(self, operation: str) -> str:
        outcomes = [outcome for outcome in self.outcomes if outcome.case.operation == operation]
        cells = [operation, ", ".join(sorted({outcome.backend for outcome in outcomes})), str(len(outcomes))]
        for dtype in DTYPES:
            errors = [o.error for o in outcomes if o.case.dtype == dtype and o.error is not None]
            cells.append(_marked(worst(errors), TOLERANCE[DTYPES[dtype]]) if errors else "")
        repeats = [outcome.repeats for outcome in outcomes if outcome.repeats is not None]
        cells.append("" if not repeats else "bit-equal" if all(repeats) else f"**{repeats.count(False)} differ**")
        cells.append(str(sum(bool(outcome.fault) for outcome in outcomes)))
        return f"| {' | '.join(cells)} |"


def _marked(error: float, tolerance: float) -> str:
    return f"{error:.1e}" if error <= tolerance else f"**{error:.1e}**"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def usable_device(name: str | None) -> torch.device:
    """The device of that name; by default the first GPU, or the CPU if torch finds none.

    Raises:
        ValueError: there is no such device here; the message lists those that are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = name or ("cuda" if count else "cpu")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in found:
        raise ValueError(
            f"there is no device {name!r} to check. torch finds {', '.join(found)}; choose one of these, or see "
            "`hqq-oft env`."
        )
    return torch.device(wanted)


def run(device: torch.device, cases: Sequence[Case] | None = None, tokens: Sequence[int] = TOKENS) -> Report:
    """Check a device with the backend that is selected.

    Args:
        device: the CPU or a GPU.
        cases: what to run; by default `all_cases()`.
        tokens: for which M to time the large layer.
    """
    begin, selected = time.perf_counter(), selected_backend()
    cases = all_cases() if cases is None else cases
    times, untimed = [], []
    if device.type == "cuda":
        # In a process of its own, as an invalid access of one kernel makes every later call of its process fail.
        compiling = multiprocessing.get_context("spawn").Process(target=compile_kernels, args=(cases, device, selected))
        compiling.start()
        compiling.join()
    gpus = [device.index] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(gpus), torch.cuda.device(gpus[0] if gpus else -1):
        warnings.simplefilter("ignore", UnverifiedKernels)
        torch.manual_seed(0)
        outcomes = [run_case(case, device) for case in tqdm(cases, "hqq-oft check", disable=None, leave=False)]
        for m in tokens:
            try:
                times.append(measure(m, device))
            except BackendError:  # the backend that was selected by name does not support this many tokens
                continue
            except Exception as problem:
                untimed.append(f"times of M={m}: {type(problem).__name__}: {problem}")
    return Report(device, identity(device), selected, outcomes, times, untimed, time.perf_counter() - begin)
