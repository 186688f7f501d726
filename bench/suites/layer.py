"""One layer against what a user would pick instead: forward in inference, and forward, backward, both in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import contenders
from ..contenders import Contender
from ..problem import Problem, Setting
from ..session import Case, Job, Session, Unavailable, unavailable
from ..timing import kept_bytes
from .profile import MAIN, Profile

OPERATIONS = frozenset({"cayley", "cayley_backward", "rotate", "rotate_backward", "linear", "linear_backward"})
Build = Callable[[Problem], Contender]
OURS = contenders.ours
ALL: tuple[Build, ...] = (
    OURS,
    contenders.dense,
    contenders.hqq,
    contenders.peft_oft,
    contenders.peft_lora,
    contenders.plain,
    contenders.scratch,
    contenders.peft_oft_aten,
)
DECODE_ONLY: tuple[Build, ...] = (
    contenders.unrotated,
    contenders.native_decode,
    contenders.gemlite,
    contenders.int4,
)
COMPILED: tuple[Build, ...] = (contenders.plain_compiled, contenders.peft_oft_compiled)
CHECKED_ROWS = 64
# A relative error beyond this says that a contender computes something else.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
OUR_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 6e-3}


def cases(profile: Profile) -> list[Case]:
    """All layers at all numbers of tokens."""
    found: list[Case] = []

    def add(priority: int, n: int, k: int, m: int, setting: Setting, builds: tuple[Build, ...], note: str = "") -> None:
        name = f"{n}x{k} M={m} {setting.label}{note}"
        facts = {"M": m, **Problem(n, k, setting, torch.device("meta")).facts}
        # The contenders of a layer are built once for all its numbers of tokens.
        key = (n, k, setting, tuple(build.__name__ for build in builds))
        jobs = partial(_jobs, profile, key, m, builds)
        if not any(case.name == name for case in found):
            found.append(Case("layer", name, priority, OPERATIONS, facts, jobs))

    main = ALL + DECODE_ONLY
    for rank, (n, k) in enumerate(profile.shapes[:3]):
        for m in profile.first:
            add(rank, n, k, m, MAIN, main)
    for rank, (n, k) in enumerate(profile.shapes):
        for m in profile.tokens:
            add(10 + rank, n, k, m, MAIN, main)
    n, k = profile.shapes[min(1, len(profile.shapes) - 1)]
    for rank, setting in enumerate(profile.variants):
        few = (OURS, contenders.dense, contenders.hqq, contenders.peft_oft_aten)
        shape = (n, k if k % setting.block == 0 else k // 192 * 192)
        for m in profile.variant_tokens:
            add(30 + rank, *shape, m, setting, few)
    for n, k, m in profile.compiled:
        add(90, n, k, m, MAIN, COMPILED, " compiled")
    return found


def build_all(problem: Problem, builds: tuple[Build, ...]) -> tuple[list[Contender], list[Job]]:
    """The contenders that can take part, checked, and rows for the others."""
    able, absent = [], []
    for build in builds:
        name = build.__name__
        try:
            contender = build(problem)
        except Unavailable as reason:
            absent.append(unavailable(name, reason))
            continue
        able.append(contender)
    return able, absent


@torch.no_grad()
def error(contender: Contender, problem: Problem, x: Tensor) -> float:
    """Relative error of the first rows of this very input against float64.

    Raises:
        RuntimeError: it is so large that something else was computed.
    """
    contender.train(False)
    out = contender.layers[0](x)[:CHECKED_ROWS].double()
    truth = problem.truth(x[:CHECKED_ROWS], contender.rotates)
    if out.shape != truth.shape:
        raise RuntimeError(f"{contender.name} gives {tuple(out.shape)} in place of {tuple(truth.shape)}")
    if problem.device.type == "meta":
        return 0.0
    found = float((out - truth).norm() / truth.norm())
    bound = (OUR_TOLERANCE if contender.name.startswith("hqq_oft") else TOLERANCE)[problem.setting.dtype]
    if not found <= bound:
        raise RuntimeError(f"{contender.name} is {found:.2e} off float64, more than {bound:.0e}: {problem.facts}")
    return found


def _jobs(profile: Profile, key: Any, m: int, builds: tuple[Build, ...], session: Session) -> list[Job]:
    n, k, setting, _ = key

    def make() -> tuple[Problem, list[Contender], list[Job]]:
        problem = Problem(n, k, setting, session.device, profile.copies(n, k))
        return problem, *build_all(problem, builds)

    problem, able, absent = session.keep(key, make)
    jobs = list(absent)
    inputs = problem.inputs(m)
    for contender in able:
        columns = {"error": error(contender, problem, inputs[0])}
        passes = contenders.forward_passes(contender, problem, m, False, session.limits)
        call = inference(contender, inputs)
        jobs.append(Job(contender.name, "forward", call, passes, problem.copies, contender.graph, dict(columns)))
        if m >= profile.training_from and contender.trains:
            jobs += _training(contender, problem, inputs, columns, session)
    return jobs


def inference(contender: Contender, inputs: list[Tensor]) -> Callable[[int], object]:
    """Forward in evaluation, with one set of buffers."""

    def call(number: int) -> object:
        layer = contender.layers[number]
        if isinstance(layer, torch.nn.Module) and layer.training:
            layer.eval()
        with torch.no_grad():
            return layer(inputs[number])

    return call


def _training(
    contender: Contender, problem: Problem, inputs: list[Tensor], columns: dict[str, Any], session: Session
) -> Iterator[Job]:
    """Backward alone, and forward with backward; a gradient reaches the input as it does inside a model."""
    m, limits = len(inputs[0]), session.limits
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = [torch.randn(m, problem.n, device=problem.device).to(problem.dtype) for _ in inputs]

    def forward(number: int) -> Tensor:
        layer = contender.layers[number]
        if isinstance(layer, torch.nn.Module) and not layer.training:
            layer.train()
        return layer(leaves[number])

    def wanted(number: int) -> list[Tensor]:
        own = len(contender.parameters) // len(contender.layers) or 1
        mine = contender.parameters[number * own : (number + 1) * own] or contender.parameters[:own]
        return [leaves[number], *mine]

    def full(number: int) -> object:
        return torch.autograd.grad(forward(number), wanted(number), grads[number])

    graphs: dict[int, Tensor] = {}

    def backward(number: int) -> object:
        if number not in graphs:
            graphs[number] = forward(number)
        return torch.autograd.grad(graphs[number], wanted(number), grads[number], retain_graph=True)

    ahead = contenders.forward_passes(contender, problem, m, True, limits)
    back = contenders.backward_passes(contender, problem, m, limits)
    outside = [*contender.held, *leaves]
    columns = columns | {"kept_mib": kept_bytes(lambda: forward(0), outside) / 2**20}
    yield Job(contender.name, "full", full, (*ahead, *back), len(inputs), False, dict(columns))
    if contender.repeats_backward:
        yield Job(contender.name, "backward", backward, back, 1, False, dict(columns))
