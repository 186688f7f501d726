"""Python and launch overhead of one layer: the GPU path over a driver that does nothing, and the native path, tiny."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hqq_oft import HqqOFTLinear

from .. import contenders
from ..host import stub_gpu
from ..problem import Problem
from ..session import Case, Job, Session
from .layer import build_all, error
from .profile import MAIN, Profile

BUILDS = (contenders.ours, contenders.dense, contenders.hqq, contenders.peft_oft, contenders.peft_lora)
GPU_SIZE, TINY, SMALL = 4096, 64, 128
STUB_NOTE = "Triton's launcher over a stub driver, sm_90; nothing is computed"
EVALUATION, TRAINING = 1, 16  # tokens


def cases(profile: Profile) -> list[Case]:
    """Evaluation and training, on both paths."""
    found = []
    for m, what in ((EVALUATION, "forward in evaluation"), (TRAINING, "forward and backward in training")):
        name = f"GPU path over a stub driver, {what}, M={m}"
        found.append(Case("host", name, 0, frozenset(), {"M": m}, partial(_stub, m), stub_gpu))
        name = f"native path, {what}, M={m}"
        found.append(Case("host", name, 0, frozenset(), {"M": m}, partial(_native, m)))
    return found


def _job(contender: contenders.Contender, problem: Problem, m: int, note: str, **columns: Any) -> Job:
    layer = contender.layers[0]
    x = torch.randn(1, m, problem.k, dtype=problem.dtype)

    def forward(number: int) -> object:
        with torch.no_grad():
            return layer(x)

    leaf, grad = x.clone().requires_grad_(), torch.randn(1, m, problem.n, dtype=problem.dtype)

    def full(number: int) -> object:
        return torch.autograd.grad(layer(leaf), [leaf, *contender.parameters], grad)

    if isinstance(layer, HqqOFTLinear):
        layer.rotations_frozen = False  # as layers are by default
    layer.train(m == TRAINING)
    phase, call = ("forward", forward) if m == EVALUATION else ("full", full)
    return Job(contender.name, phase, call, columns={"note": note, **problem.facts, **columns})


def _stub(m: int, session: Session) -> list[Job]:
    """Ours on a layer of 4096 x 4096 whose kernels never run; the others' operators on CPU tensors, next to no work."""
    problem, tiny = (Problem(size, size, MAIN, session.device) for size in (GPU_SIZE, TINY))
    ours = _job(
        contenders.ours(problem), problem, m, "Triton's launcher over a stub driver, sm_90; nothing is computed"
    )
    able, absent = build_all(tiny, BUILDS[1:])
    note = f"eager CPU operators on a layer of {TINY} x {TINY}, computed"
    return [ours, *(_job(contender, tiny, m, note) for contender in able), *absent]


def _native(m: int, session: Session) -> list[Job]:
    problem = Problem(SMALL, SMALL, MAIN, session.device)
    able, absent = build_all(problem, BUILDS)
    note = f"CPU kernels on a layer of {SMALL} x {SMALL}, computed"
    x = problem.inputs(m)[0]
    jobs = [_job(contender, problem, m, note, error=error(contender, problem, x)) for contender in able]
    return [*jobs, *absent]
