"""Kinds of cases: how layers, operations, merges and the host's overhead become jobs; `llama.py`: whole models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn

from hqq_oft import functional
from hqq_oft.check.cases import skew_parameters
from hqq_oft.check.measure import TOLERANCE, relative_error
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops
from hqq_oft.quant.quantizer import requantize
from hqq_oft.tuner.fold import rotate_weight
from tests.stub_gpu import stub_gpu

from . import contenders, model
from .contenders import DENSE, HQQ, LORA, OURS, PEFT, Contender
from .problem import Problem, Setting, buffer_sets, hqq_layer
from .timing import Call, Limits, called, kept_mib, once

MAIN = Setting()


class Shape(NamedTuple):
    """Out-features and in-features."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass
class Job:
    """Something to time, one phase of a contender's work; `hqq_oft` is what all others are compared with."""

    contender: str
    phase: str = ""
    call: Call | None = None  # with the number of one of the `copies` sets of buffers; None if nothing is to be timed
    passes: tuple[model.Cost, ...] = ()  # what it must do at least
    copies: int = 1
    graph: bool = False  # whether a CUDA graph may capture it
    columns: dict[str, Any] = field(default_factory=dict)  # more of its row: an error, memory, or why it cannot run


@dataclass(frozen=True)
class Kind:
    """How cases of a kind are named and become jobs, within `context`."""

    suite: str
    name: str  # a format of their parameters
    operations: frozenset[str]  # whose tests must pass before a figure is reported
    jobs: Callable[..., Iterable[Job]]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Case:
    """A kind with one value per parameter; lower priorities run first."""

    kind: Kind
    priority: int
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kind.name.format(**self.parameters)

    @property
    def facts(self) -> dict[str, Any]:
        """Columns of all its rows."""
        found = {"M": self.parameters["m"]} if "m" in self.parameters else {}
        for value in self.parameters.values():
            if isinstance(value, (Setting, Shape)):
                found |= asdict(value) if isinstance(value, Setting) else {"N": value.n, "K": value.k}
        return found


KINDS: dict[str, Kind] = {}


def kind(suite: str, name: str, operations: str = "", **options: Any) -> Callable[[Any], Any]:
    """Register a function that makes the jobs of a kind, under the function's name."""

    def register(jobs: Any) -> Any:
        KINDS[jobs.__name__] = Kind(suite, name, frozenset(operations.split()), jobs, **options)
        return jobs

    return register


PRODUCT = "cayley cayley_backward rotate rotate_backward linear linear_backward"
TRAINING_FROM, DECODE_UP_TO = 256, 32  # tokens
CHECKED_ROWS = 64
TOLERANCE_OF_OTHERS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check(name: str, out: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Relative error against float64; an exception if it is so large that something else was computed."""
    if out.shape != truth.shape:
        raise RuntimeError(f"{name} returns {tuple(out.shape)} instead of {tuple(truth.shape)}")
    found = relative_error(out, truth)
    bound = (TOLERANCE if name.startswith(OURS) else TOLERANCE_OF_OTHERS)[dtype]
    if not found <= bound:
        raise RuntimeError(f"{name} is {found:.2e} off float64, more than {bound:.0e}")
    return found


@kind("layer", "{shape} M={m} {setting.label}", PRODUCT)
def layer(
    session: Any, shape: Shape, m: int, setting: Setting, against: tuple[str, ...], build: Any = contenders.build
) -> Iterator[Job]:
    """One layer against what a user would pick instead: forward in inference; forward and backward in training."""
    # Once for all numbers of tokens.
    make = partial(Problem, *shape, setting, session.device, buffer_sets(setting.layer(*shape), session.device))
    problem, built = session.keep((shape, setting, against, build), lambda: (make(), {}))
    inputs = problem.inputs(m)
    truths = {rotates: problem.truth(inputs[0][:CHECKED_ROWS], rotates) for rotates in (True, False)}
    for name in against:
        try:
            contender = built[name] = built.get(name) or build(name, problem)
            if m <= DECODE_UP_TO or not contender.decodes_only:
                yield from _layer_jobs(contender, problem, inputs, truths[contender.rotates], session.limits)
        except Exception as error:  # of code that is not ours costs its own row only
            if name == OURS:
                raise
            yield Job(name, columns={"status": contenders.failure(error)})


@kind("layer", "{shape} M={m} {setting.label} against GemLite", PRODUCT)
def layer_against_gemlite(session: Any, shape: Shape, m: int, setting: Setting) -> Iterator[Job]:
    """A case of its own: what GemLite compiles and tries out at its first call holds up nothing else."""
    yield from layer(session, shape, m, setting, (OURS, "GemLite"))


@kind("layer", "OFT on a dense layer, {shape} M={m} b={setting.block} {setting.dtype}", PRODUCT)
def layer_on_dense(session: Any, shape: Shape, m: int, setting: Setting) -> Iterator[Job]:
    """OFT on dense layers, by this package and by PEFT, and the layers alone."""
    yield from layer(session, shape, m, setting, (OURS, DENSE, PEFT), contenders.on_dense)


def _calls(contender: Contender, inputs: list[Tensor], n: int) -> tuple[Call, Call, list[Tensor], list[Tensor]]:
    """Inference; forward and backward, whose gradient reaches the input as inside a model; leaves, gradients."""
    layers, leaves = contender.layers, [x.detach().requires_grad_() for x in inputs]
    grads = [torch.randn(*x.shape[:-1], n, device=x.device).to(x.dtype) for x in inputs]

    def inference(number: int) -> Tensor:
        with torch.no_grad():
            return layers[number](inputs[number])

    def full(number: int) -> object:
        y = layers[number](leaves[number])
        return torch.autograd.grad(y, contender.wanted(number, leaves[number]), grads[number])

    return inference, full, leaves, grads


def _layer_jobs(
    contender: Contender, problem: Problem, inputs: list[Tensor], truth: Tensor, limits: Limits
) -> Iterator[Job]:
    m, name, layers, cost = len(inputs[0]), contender.name, contender.layers, problem.layer
    cost = cost if contender.rotates else replace(cost, block=None)
    inference, full, leaves, grads = _calls(contender, inputs, problem.n)
    columns = {"error": check(name, inference(0)[:CHECKED_ROWS], truth, problem.dtype)}
    ahead = contenders.forward_passes(contender, cost, m, limits)
    yield Job(name, "forward", inference, ahead, len(inputs), True, columns)
    if m < TRAINING_FROM or contender.decodes_only:
        return
    ahead = contenders.forward_passes(contender, cost, m, limits, training=True)
    back = contenders.backward_passes(contender, cost, m, limits)
    columns = columns | {"kept_mib": kept_mib(lambda: layers[0](leaves[0]))}
    yield Job(name, "full", full, (*ahead, *back), len(inputs), True, columns)
    backward = partial(torch.autograd.grad, layers[0](leaves[0]), contender.wanted(0, leaves[0]), grads[0], True)
    yield Job(name, "backward", called(backward), back, columns=columns)


def _ungraded(way: Callable[[], object]) -> Call:
    return called(torch.no_grad()(way))


def peft_rotation(problem: Problem) -> OFTRotationModule:
    """PEFT's module that computes and applies a rotation."""
    setting, b = problem.setting, problem.setting.block
    blocks = 1 if setting.share else problem.k // b
    options = {"block_share": setting.share, "use_cayley_neumann": not setting.exact, "num_cayley_neumann_terms": 5}
    module = OFTRotationModule(blocks, b * (b - 1) // 2, b, problem.k, **options).to(problem.device)
    module.weight = nn.Parameter(problem.v.clone())
    return module


@kind("ops", "cayley K={k} {setting.label}", "cayley cayley_backward")
def cayley(session: Any, k: int, setting: Setting) -> Iterator[Job]:
    """v to D and back, against PEFT's."""
    problem = Problem(k, k, setting, session.device)
    b, terms, cost = setting.block, setting.terms, problem.layer
    v, module = problem.v.clone().requires_grad_(), peft_rotation(problem)
    ways: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        OURS: (lambda: functional.cayley(v, block_size=b, terms=terms, dtype=problem.dtype), v),
        "PEFT": (lambda: module._cayley_batch(module.weight, b, not setting.exact, 5), module.weight),
    }
    for name, (way, leaf) in ways.items():
        result = way()
        backward = partial(torch.autograd.grad, result, leaf, torch.randn_like(result), retain_graph=True)
        captured = name == OURS and terms is not None
        yield Job(name, "forward", _ungraded(way), (model.cayley(cost, terms),), 1, captured)
        yield Job(name, "backward", called(backward), (model.cayley_backward(cost, terms),))


@kind("ops", "cayley all {adapters[0]} adapters of a model", "cayley")
def cayley_many(session: Any, adapters: tuple[int, tuple[int, ...]]) -> Iterator[Job]:
    """All adapters of a model (how many, their features) in one launch, against one after the other."""
    features, b = adapters[1], MAIN.block
    vs = [skew_parameters(k // b, b, session.device) for k in features]
    batch = peft_rotation(Problem(b, b, MAIN, session.device))._cayley_batch
    cost = sum((model.cayley(MAIN.layer(k, k), 5) for k in features), model.Cost(0, 0))
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: functional.cayley_many(vs, b, 5, dtype=torch.bfloat16),
        f"{OURS}, one by one": lambda: [functional.cayley(v, b, 5, dtype=torch.bfloat16) for v in vs],
        "PEFT": lambda: [batch(v, b, True, 5) for v in vs],
    }
    for name, way in ways.items():
        yield Job(name, "forward", _ungraded(way), (cost,), 1, name == OURS)


@kind("ops", "rotate K={k} M={m}", "rotate rotate_backward")
def rotate(session: Any, k: int, m: int) -> Iterator[Job]:
    """x R, and its gradients."""
    problem = Problem(k, k, MAIN, session.device)
    cost, d = problem.layer, problem.d
    x, g = problem.inputs(m)[0], problem.inputs(m)[0]
    module = torch.no_grad()(peft_rotation(problem))
    ahead, back = (model.rotate(cost, m),), (model.rotate_backward(cost, m),)
    truth = reference.rotate(x[:CHECKED_ROWS].double(), d.double(), None, False)
    error = {"error": check(OURS, ops.rotate(x[:CHECKED_ROWS], d, None, False), truth, problem.dtype)}
    yield Job(OURS, "forward", lambda _: ops.rotate(x, d, None, False), ahead, 1, True, error)
    yield Job(OURS, "backward", lambda _: ops.rotate_backward(g, x, d, None, False, True, True), back, 1, True)
    yield Job("PEFT", "forward", lambda _: module(x), (model.cayley(cost, MAIN.terms), *ahead))


@kind("ops", "dequantize {shape} {setting.label}", "dequantize dequantize_rotate")
def dequantize(session: Any, shape: Shape, setting: Setting) -> Iterator[Job]:
    """W, and W R^T, from packed bytes."""
    copies = buffer_sets(setting.layer(*shape), session.device)
    problem = Problem(*shape, setting, session.device, copies)
    cost, d, dtype = problem.layer, problem.d, problem.dtype
    weights, hqq = problem.weights, [hqq_layer(weight, dtype) for weight in problem.weights]
    dense = [problem.dense, *(problem.dense.clone() for _ in range(copies - 1))]
    truth = reference.dequantize_rotate(weights[0], d.double(), torch.float64)
    error = {"error": check(OURS, ops.dequantize_rotate(weights[0], d, dtype), truth, dtype)}
    flat, rotated = model.dequantize(cost), model.dequantize_rotate(cost)
    ways: tuple[tuple[str, str, Call, model.Cost, dict[str, float]], ...] = (
        (OURS, "dequantize_rotate", lambda i: ops.dequantize_rotate(weights[i], d, dtype), rotated, error),
        (OURS, "dequantize", lambda i: ops.dequantize(weights[i], dtype), flat, {}),
        (HQQ, "dequantize", lambda i: hqq[i].dequantize(), flat, {}),
        ("copy", "dequantize", lambda i: dense[i].clone(), model.copy(cost), {}),
    )
    for name, phase, way, passed, columns in ways:
        yield Job(name, phase, way, (passed,), copies, True, columns)


DENSE_ROTATION_LIMIT = 4 << 30  # bytes of PEFT's K x K matrix, of which it makes several


@kind("merge", "{shape} {setting.label}", "cayley dequantize dequantize_rotate rotate")
def merge(session: Any, shape: Shape, setting: Setting) -> Iterator[Job]:
    """The part of a merge that rotates the weight, and all of it; PEFT's takes seconds, and is called once."""
    problem = Problem(*shape, setting, session.device)
    (n, k), cost, peft = shape, problem.layer, contenders.build(PEFT, problem).layers[0]
    ours = contenders.build(OURS, problem).layers[0]
    ours.rotations_frozen = False

    def rotated() -> Tensor:
        return rotate_weight(problem.weights[0], [("default", ours._rotation("default"))], check=False)

    def folded(_: int) -> Tensor:  # a merge into a dense layer
        d = functional.cayley(problem.v, block_size=setting.block, dtype=problem.dtype)
        return functional.dequantize_rotate(problem.weights[0], d, problem.dtype)

    def merged_and_back(_: int) -> None:
        ours.merge()
        ours.unmerge()

    def peft_rotated(_: int) -> Tensor:  # a dense K x K rotation and a dense product
        delta = peft.get_delta_weight("default")
        return torch.mm(delta, peft.get_base_layer().dequantize().transpose(0, 1).to(delta.dtype)).transpose(0, 1)

    dense, copy = rotated(), problem.dense.clone()
    wide = (model.Cost(cost.weight_bytes + 4 * n * k + 4 * k * setting.block, 2 * n * k * (1 + setting.block)),)
    fold, moved = (model.dequantize_rotate(cost),), (model.copy(cost),)
    only = "rotate without requantizing"
    yield Job(OURS, "rotate", lambda _: rotated(), wide)
    yield Job(OURS, only, torch.no_grad()(folded), fold)
    yield Job("copy", only, lambda _: copy.copy_(problem.dense), moved)
    yield Job("copy, new memory", only, lambda _: problem.dense.clone(), moved)  # whose pages a CPU clears first
    yield Job(OURS, "requantize", lambda _: requantize(ours.get_base_layer(), dense))
    yield Job(OURS, "whole", merged_and_back)
    if 4 * k * k <= DENSE_ROTATION_LIMIT:
        yield Job(PEFT, "whole", columns=once(contenders.build(PEFT, problem).layers[0].merge, session.device))
        yield Job("PEFT", "rotate", torch.no_grad()(peft_rotated), wide)


CHOICES = (OURS, DENSE, HQQ, PEFT, LORA)  # what a user picks from
TINY, SMALL, LARGE = 64, 128, 4096  # in- and out-features


def _host(session: Any, name: str, size: int, m: int, note: str, checked: bool) -> Iterator[Job]:
    problem = Problem(size, size, MAIN, session.device)
    contender = contenders.build(name, problem)
    layer, x, columns = contender.layers[0], problem.inputs(m)[0], {"note": note, "N": size, "K": size}
    if checked:
        out = torch.no_grad()(layer)(x)
        columns["error"] = check(name, out, problem.truth(x, contender.rotates), problem.dtype)
    if name == OURS:
        layer.rotations_frozen = False  # as by default
    layer.train(m > 1)
    inference, full, *_ = _calls(contender, [x.view(1, m, size)], size)
    yield Job(name, "full" if m > 1 else "forward", full if m > 1 else inference, columns=columns)


@kind("host", "GPU path over a stub driver, {what}, M={m}", context=stub_gpu)
def host_stub(session: Any, m: int, what: str) -> Iterator[Job]:
    """Ours with every kernel launched into a driver that does nothing; the others' operators on next to no data."""
    yield from _host(session, OURS, LARGE, m, "Triton's launcher over a stub driver, sm_90; nothing is computed", False)
    for name in CHOICES[1:]:
        yield from _host(session, name, TINY, m, "eager operators on CPU tensors, computed; no launches", True)


@kind("host", "native path, {what}, M={m}")
def host_native(session: Any, m: int, what: str) -> Iterator[Job]:
    """A layer so small that the rest of a call takes longer than its arithmetic."""
    for name in CHOICES:
        yield from _host(session, name, SMALL, m, "CPU kernels, computed", True)
