"""Single operations: Cayley transforms, rotations, dequantizing; against PEFT's, HQQ's and plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn

from hqq_oft import functional
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

from .. import model
from ..problem import TOLERANCE, Problem, Setting, hqq_layer, relative_error, skew_parameters
from ..session import Case, Job, Session
from .profile import MAIN, Profile


def cases(profile: Profile) -> list[Case]:
    """The most telling first."""
    found = [
        _case("cayley", f"all {len(profile.adapters)} adapters of a model", 0, _cayley_many, profile.adapters),
    ]
    for rank, (n, k) in enumerate(profile.shapes):
        shape = f"{n}x{k} {MAIN.label}"
        found.append(_case("dequantize", shape, 1 + rank, _dequantize, n, k, MAIN, profile.copies(n, k)))
        found.append(_case("rotate", f"K={k} M={profile.tokens[-1]}", 2 + rank, _rotate, k, profile.tokens[-1], MAIN))
    for rank, k in enumerate(dict.fromkeys(k for _, k in profile.shapes)):
        found.append(_case("cayley", f"K={k} {MAIN.label}", 2 + rank, _cayley, k, MAIN, False))
    n, k = profile.shapes[0]
    if profile.compiled:  # minutes of compilation must not hold up the rest
        found.append(_case("cayley", f"K={k} {MAIN.label} compiled", 30, _cayley, k, MAIN, True))
    for setting in profile.variants:
        if k % setting.block == 0:
            found.append(
                _case("dequantize", f"{n}x{k} {setting.label}", 20, _dequantize, n, k, setting, profile.copies(n, k))
            )
            if (setting.bits, setting.group, setting.axis, setting.dtype) == (4, 64, 1, "bf16"):
                found.append(_case("cayley", f"K={k} {setting.label}", 21, _cayley, k, setting, False))
    return found


def _case(operation: str, name: str, priority: int, jobs: Callable[..., list[Job]], *args: Any) -> Case:
    needed = {"dequantize": {"dequantize", "dequantize_rotate"}, "rotate": {"rotate", "rotate_backward"}}
    operations = needed.get(operation, {"cayley", "cayley_backward"})
    facts: dict[str, Any] = {}
    for value in args:
        if isinstance(value, Setting):
            facts = asdict(value)
    return Case("ops", f"{operation} {name}", priority, frozenset(operations), facts, lambda s: jobs(*args, session=s))


def peft_rotation(problem: Problem) -> OFTRotationModule:
    """PEFT's module that makes and applies a rotation."""
    setting = problem.setting
    blocks, b = problem.k // setting.block, setting.block
    module = OFTRotationModule(
        1 if setting.share else blocks,
        b * (b - 1) // 2,
        b,
        problem.k,
        block_share=setting.share,
        use_cayley_neumann=not setting.exact,
        num_cayley_neumann_terms=5,
    ).to(problem.device)
    module.weight = nn.Parameter(problem.v.clone())
    return module


def _cayley(k: int, setting: Setting, compiled: bool, session: Session) -> list[Job]:
    problem = Problem(k, k, setting, session.device)
    b, terms, layer = setting.block, setting.terms, problem.layer
    v = problem.v.clone().requires_grad_()
    module = peft_rotation(problem)
    ways: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "hqq_oft": (lambda: functional.cayley(v, block_size=b, terms=terms, dtype=problem.dtype), v),
        "PEFT": (lambda: module._cayley_batch(module.weight, b, not setting.exact, 5), module.weight),
    }
    if compiled and session.device.type == "cuda":
        batch = torch.compile(module._cayley_batch, dynamic=False)
        ways["PEFT, compiled"] = (lambda: batch(module.weight, b, not setting.exact, 5), module.weight)
    jobs = []
    for name, (way, leaf) in ways.items():
        result = way()
        grad = torch.randn_like(result)

        def forward(number: int, way: Callable[[], Tensor] = way) -> object:
            with torch.no_grad():
                return way()

        def backward(number: int, result: Tensor = result, leaf: Tensor = leaf, grad: Tensor = grad) -> object:
            return torch.autograd.grad(result, leaf, grad, retain_graph=True)

        captured = name == "hqq_oft" and terms is not None
        jobs.append(Job(name, "forward", forward, (model.cayley(layer, terms),), 1, captured))
        jobs.append(Job(name, "backward", backward, (model.cayley_backward(layer, terms),)))
    return jobs


def _cayley_many(adapters: tuple[int, ...], session: Session) -> list[Job]:
    """All adapters of a model in one launch, against one after the other."""
    b = MAIN.block
    vs = [skew_parameters(k // b, b, session.device) for k in adapters]
    problems = [Problem(k, k, MAIN, session.device) for k in dict.fromkeys(adapters)]
    modules = {problem.k: peft_rotation(problem) for problem in problems}
    cost = model.Cost(0, 0)
    for k in adapters:
        cost = cost + model.cayley(MAIN.layer(k, k), 5)

    def peft(number: int) -> None:
        for k, v in zip(adapters, vs, strict=True):
            modules[k]._cayley_batch(v, b, True, 5)

    def single(number: int) -> None:
        for v in vs:
            functional.cayley(v, block_size=b, dtype=torch.bfloat16)

    ways: dict[str, Callable[[int], object]] = {
        "hqq_oft": lambda number: functional.cayley_many(vs, block_size=b, dtype=torch.bfloat16),
        "hqq_oft, one by one": single,
        "PEFT": peft,
    }
    with torch.no_grad():
        return [Job(name, "forward", way, (cost,), 1, name == "hqq_oft") for name, way in ways.items()]


def _rotate(k: int, m: int, setting: Setting, session: Session) -> list[Job]:
    problem = Problem(k, k, setting, session.device)
    b, layer, d = setting.block, problem.layer, problem.d
    x, g = problem.inputs(m)[0], problem.inputs(m)[0]
    module = peft_rotation(problem)

    def plain(number: int) -> Tensor:
        blocks = x.view(m, -1, b).transpose(0, 1)
        return torch.baddbmm(blocks, blocks, d.expand(k // b, -1, -1)).transpose(0, 1).reshape(m, k)

    def plain_backward(number: int) -> tuple[Tensor, Tensor]:
        left, right = x.view(m, -1, b).transpose(0, 1), g.view(m, -1, b).transpose(0, 1)
        dx = torch.baddbmm(right, right, d.transpose(1, 2).expand(k // b, -1, -1)).transpose(0, 1).reshape(m, k)
        return dx, torch.bmm(left.transpose(1, 2), right)

    def peft(number: int) -> Tensor:
        with torch.no_grad():
            return module(x)

    ahead, back = (model.rotate(layer, m),), (model.rotate_backward(layer, m),)
    ours = Job("hqq_oft", "forward", lambda number: ops.rotate(x, d, None, False), ahead, 1, True)
    ours.columns["error"] = _error(ops.rotate(x[:64], d, None, False), reference.rotate, x[:64], d, None, False)
    return [
        ours,
        Job("hqq_oft", "backward", lambda number: ops.rotate_backward(g, x, d, None, False, True, True), back, 1, True),
        Job("plain PyTorch", "forward", plain, ahead, 1, True),
        Job("plain PyTorch", "backward", plain_backward, back, 1, True),
        Job("PEFT", "forward", peft, (model.cayley(layer, setting.terms), *ahead)),
    ]


def _dequantize(n: int, k: int, setting: Setting, copies: int, session: Session) -> list[Job]:
    problem = Problem(n, k, setting, session.device, copies)
    layer, d, dtype, b = problem.layer, problem.d, problem.dtype, setting.block
    weights = [weight.arguments() for weight in problem.weights]
    hqq = [hqq_layer(weight, dtype) for weight in problem.weights]

    def plain(number: int) -> Tensor:
        blocks = hqq[number].dequantize().view(n, -1, b).transpose(0, 1)
        return torch.baddbmm(blocks, blocks, d.transpose(1, 2).expand(k // b, -1, -1)).transpose(0, 1).reshape(n, k)

    dense = [problem.dense, *(problem.dense.clone() for _ in range(copies - 1))]
    copied = (model.copy(layer),)
    flat, rotated = (model.dequantize(layer),), (model.dequantize_rotate(layer),)
    ways: tuple[tuple[str, str, Callable[[int], object], tuple[model.Cost, ...]], ...] = (
        ("hqq_oft", "dequantize_rotate", lambda i: ops.dequantize_rotate(*weights[i], d, dtype), rotated),
        ("HQQ + plain rotation", "dequantize_rotate", plain, rotated),
        ("hqq_oft", "dequantize", lambda i: ops.dequantize(*weights[i], dtype), flat),
        ("HQQ", "dequantize", lambda i: hqq[i].dequantize(), flat),
        ("copy", "dequantize", lambda i: dense[i].clone(), copied),
    )
    jobs = [Job(name, phase, way, passes, copies, True) for name, phase, way, passes in ways]
    out = ops.dequantize_rotate(*weights[0], d, dtype)
    jobs[0].columns["error"] = _error(out, reference.dequantize_rotate, *weights[0], d, torch.float64)
    return jobs


def _error(out: Tensor, truth_of: Callable[..., Tensor], *args: Any) -> float:
    """Relative error against the reference in float64.

    Raises:
        RuntimeError: it is beyond what the dtype may lose.
    """
    wide = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    truth = truth_of(*wide)
    if out.device.type == "meta":
        return 0.0
    found, bound = relative_error(out, truth), TOLERANCE[out.dtype]
    if not found <= bound:
        raise RuntimeError(f"{truth_of.__name__} is {found:.2e} off float64, more than {bound:.0e}")
    return found
