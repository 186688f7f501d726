"""Merging: the part that rotates the weight, the part that quantizes it again, and both for a stack of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hqq_oft import functional
from hqq_oft.quant import hqq_layer
from hqq_oft.tuner import fold

from .. import contenders, model
from ..problem import Problem
from ..session import Case, Job, Session
from .model import linear_shapes
from .profile import MAIN, Profile

OPERATIONS = frozenset({"cayley", "dequantize", "dequantize_rotate", "rotate"})
DENSE_ROTATION_LIMIT = 4 << 30  # bytes of PEFT's K x K matrix, made several times over


def cases(profile: Profile) -> list[Case]:
    """One case per shape, then a decoder layer's seven."""
    found = []
    for rank, (n, k) in enumerate(profile.shapes):
        facts = Problem(n, k, MAIN, torch.device("meta")).facts
        found.append(Case("merge", f"{n}x{k} {MAIN.label}", rank, OPERATIONS, facts, partial(_layer, n, k)))
    shape = profile.decoder
    name = f"a decoder layer of width {shape.hidden}"
    found.append(Case("merge", name, 10, OPERATIONS, {}, partial(_stack, profile)))
    return found


def _layer(n: int, k: int, session: Session) -> list[Job]:
    problem = Problem(n, k, MAIN, session.device)
    layer = problem.layer
    ours = contenders.ours(problem).layers[0]
    rotation = [("default", ours._rotation("default"))]
    dense = fold.rotate_weight(problem.weights[0], rotation, check=False)
    wide = model.Cost(layer.weight_bytes + 4 * n * k + 4 * k * MAIN.block, 2 * n * k * (1 + MAIN.block))
    copy = problem.dense.clone()

    def rotate(number: int) -> Tensor:
        d = [("default", ours._rotation("default"))]
        return fold.rotate_weight(problem.weights[0], d, check=False)

    jobs = [
        Job("hqq_oft", "rotate", rotate, (wide,)),
        Job("hqq_oft", "rotate without requantizing", _folded(problem), (model.dequantize_rotate(layer),)),
        Job("copy", "rotate without requantizing", lambda _: copy.copy_(problem.dense), (model.copy(layer),)),
        # as the merged weight is: on a CPU its pages are made and cleared first
        Job("copy, new memory", "rotate without requantizing", lambda _: problem.dense.clone(), (model.copy(layer),)),
    ]
    if session.device.type != "meta":  # HQQ's quantizer reads values
        jobs.append(Job("HQQ", "requantize", lambda _: hqq_layer.requantize(ours.get_base_layer(), dense)))
        jobs.append(Job("hqq_oft", "whole", _merge_and_unmerge(ours)))
    if 4 * k * k <= DENSE_ROTATION_LIMIT:
        jobs.append(Job("PEFT", "rotate", _peft(problem), (wide,)))
    return jobs


def _folded(problem: Problem) -> Callable[[int], object]:
    """`W R^T` in the layer's dtype: what a merge into a dense layer makes."""
    weight, v, b = problem.weights[0], problem.v, MAIN.block

    def call(number: int) -> object:
        with torch.no_grad():
            d = functional.cayley(v, block_size=b, dtype=problem.dtype)
            return functional.dequantize_rotate(weight, d, problem.dtype)

    return call


def _peft(problem: Problem) -> Callable[[int], object]:
    """What PEFT's merge does before it quantizes: a dense K x K rotation and a dense product."""
    layer = contenders.peft_oft(problem).layers[0]
    base = layer.get_base_layer()

    def call(number: int) -> Tensor:
        with torch.no_grad():
            delta = layer.get_delta_weight("default")
            weight = base.dequantize().transpose(0, 1)
            return torch.mm(delta, weight.to(delta.dtype)).transpose(0, 1)

    return call


def _merge_and_unmerge(layer: torch.nn.Module) -> Callable[[int], object]:
    def call(number: int) -> None:
        layer.merge()
        layer.unmerge()

    return call


def _stack(profile: Profile, session: Session) -> list[Job]:
    """Rotating the seven weights of a decoder layer, and merging them."""
    problems = [Problem(n, k, MAIN, session.device) for n, k in linear_shapes(profile.decoder)]
    layers = [contenders.ours(problem).layers[0] for problem in problems]
    costs = tuple(model.dequantize_rotate(problem.layer) for problem in problems)
    folds = [_folded(problem) for problem in problems]

    def fold(number: int) -> None:
        for one in folds:
            one(0)

    def merge(number: int) -> None:
        for layer in layers:
            _merge_and_unmerge(layer)(0)

    jobs = [Job("hqq_oft", "rotate without requantizing", fold, costs)]
    if session.device.type != "meta":
        jobs.append(Job("hqq_oft", "whole", merge))
    return jobs
