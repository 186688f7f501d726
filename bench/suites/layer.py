"""One layer against what a user would pick instead: forward in inference, and forward, backward, both in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hqq_oft import HqqOFTLinear

from .. import contenders
from ..contenders import Contender
from ..problem import TOLERANCE, Problem, Setting, relative_error
from ..session import Case, Job, Session, Unavailable, failure, unavailable
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
DECODE_ONLY: tuple[Build, ...] = (contenders.unrotated, contenders.native_decode, contenders.int4)
# Cases of their own, where what these compile and try out at their first call holds up nothing else.
GEMLITE: tuple[Build, ...] = (OURS, contenders.gemlite)
COMPILED: tuple[Build, ...] = (OURS, contenders.plain_compiled, contenders.peft_oft_compiled)
DECODE_UP_TO = 32  # tokens
CHECKED_ROWS = 64
# A relative error beyond this says that a contender computes something else.
TOLERANCE_OF_OTHERS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def cases(profile: Profile) -> list[Case]:
    """All layers at all numbers of tokens."""
    found: list[Case] = []

    def add(priority: int, n: int, k: int, m: int, setting: Setting, builds: tuple[Build, ...], note: str = "") -> None:
        name = f"{n}x{k} M={m} {setting.label}{note}"
        facts = {"M": m, **Problem(n, k, setting, torch.device("meta")).facts}
        # A compiled layer is one more compilation for each set of buffers: it has one, and the cache is flushed anyway.
        copies = 1 if builds is COMPILED else profile.copies(n, k)
        jobs = partial(_jobs, profile, (n, k, setting), m, copies, builds)
        found.append(Case("layer", name, priority, OPERATIONS, facts, jobs))

    for rank, (n, k) in enumerate(profile.shapes[:3]):
        for m in profile.first:
            add(rank, n, k, m, MAIN, ALL + DECODE_ONLY)
    for rank, (n, k) in enumerate(profile.shapes):
        for m in profile.tokens:
            add(10 + rank, n, k, m, MAIN, ALL + DECODE_ONLY)
    for rank, (n, k) in enumerate(profile.shapes[1:3]):
        for m in profile.against_gemlite:
            add(20 + rank, n, k, m, MAIN, GEMLITE, " against GemLite")
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
    """The contenders that can take part, and rows for the others."""
    able, absent = [], []
    for build in builds:
        try:
            able.append(build(problem))
        except Unavailable as reason:
            absent.append(unavailable(build.__name__, reason))
        except Exception as error:  # code that is not ours must not cost the rest; its row and the exit status say so
            if build is OURS:
                raise
            absent.append(Job(build.__name__, "", None, columns={"status": failure(error)}))
    # Else each replay of a captured graph would make the rotations anew, which no one does who serves.
    for contender in able:
        for layer in contender.layers:
            if isinstance(layer, HqqOFTLinear):
                layer.rotations_frozen = True
    return able, absent


@torch.no_grad()
def error(contender: Contender, problem: Problem, x: Tensor, truth: Tensor | None = None) -> float:
    """Relative error of the first rows of this very input against float64.

    Args:
        contender, problem: what computes, and what should be computed.
        x: the input.
        truth: `problem.truth` of the first `CHECKED_ROWS`, where it is known.

    Raises:
        RuntimeError: it is so large that something else was computed.
    """
    out = contender.layers[0](x)[:CHECKED_ROWS].double()
    if truth is None:
        truth = problem.truth(x[:CHECKED_ROWS], contender.rotates)
    if out.shape != truth.shape:
        raise RuntimeError(f"{contender.name} gives {tuple(out.shape)} in place of {tuple(truth.shape)}")
    if problem.device.type == "meta":
        return 0.0
    found = relative_error(out, truth)
    bound = (TOLERANCE if contender.name.startswith("hqq_oft") else TOLERANCE_OF_OTHERS)[problem.dtype]
    if not found <= bound:
        raise RuntimeError(f"{contender.name} is {found:.2e} off float64, more than {bound:.0e}: {problem.facts}")
    return found


def _jobs(
    profile: Profile,
    layer: tuple[int, int, Setting],
    m: int,
    copies: int,
    builds: tuple[Build, ...],
    session: Session,
) -> list[Job]:
    n, k, setting = layer

    def make() -> tuple[Problem, list[Contender], list[Job]]:
        problem = Problem(n, k, setting, session.device, copies)
        return problem, *build_all(problem, builds)

    # The contenders of a layer are built once for all its numbers of tokens.
    problem, able, absent = session.keep((layer, builds), make)
    jobs = list(absent)
    inputs = problem.inputs(m)
    if m >= profile.training_from:
        leaves = [x.detach().requires_grad_() for x in inputs]
        grads = [torch.randn(m, n, device=problem.device).to(problem.dtype) for _ in inputs]
    truths = {rotates: problem.truth(inputs[0][:CHECKED_ROWS], rotates) for rotates in {c.rotates for c in able}}
    for contender in able:
        if m > DECODE_UP_TO and contender.decodes_only:
            continue
        try:
            columns = {"error": error(contender, problem, inputs[0], truths[contender.rotates])}
            found = [_inference(contender, problem, inputs, columns, session)]
            if m >= profile.training_from:
                found += _training(contender, problem, leaves, grads, columns, session)
        except Exception as failed:
            if contender.name == "hqq_oft":
                raise
            found = [Job(contender.name, "", None, columns={"status": failure(failed)})]
        jobs += found
    return jobs


def _inference(
    contender: Contender, problem: Problem, inputs: list[Tensor], columns: dict[str, Any], session: Session
) -> Job:
    """Forward with one set of buffers, nothing recorded."""

    def call(number: int) -> object:
        with torch.no_grad():
            return contender.layers[number](inputs[number])

    passes = contenders.forward_passes(contender, problem, len(inputs[0]), False, session.limits)
    return Job(contender.name, "forward", call, passes, len(inputs), not contender.compiled, dict(columns))


def _training(
    contender: Contender,
    problem: Problem,
    leaves: list[Tensor],
    grads: list[Tensor],
    columns: dict[str, Any],
    session: Session,
) -> Iterator[Job]:
    """Backward alone, and forward with backward; a gradient reaches the input as it does inside a model."""
    m, limits = len(leaves[0]), session.limits

    def forward(number: int) -> Tensor:
        return contender.layers[number](leaves[number])

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
    columns = columns | {"kept_mib": kept_bytes(lambda: forward(0), [*contender.held, *leaves]) / 2**20}
    yield Job(contender.name, "full", full, (*ahead, *back), len(leaves), not contender.compiled, dict(columns))
    if not contender.compiled:
        yield Job(contender.name, "backward", backward, back, 1, False, dict(columns))
