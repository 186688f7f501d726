"""Kinds of cases: how layers, single operations, merges and the host's overhead become jobs to time.

`bench/llama.py` has those of whole models, `bench/table.py` the sizes of each.
"""

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
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops
from hqq_oft.quant.hqq_layer import requantize
from hqq_oft.tuner.fold import rotate_weight

from . import contenders, model
from .contenders import DENSE, HQQ, LORA, OURS, PEFT, Contender, rotate_blocks
from .host import stub_gpu
from .problem import TOLERANCE, Problem, Setting, hqq_layer, relative_error, skew_parameters
from .timing import Call, Limits, kept_mib

MAIN = Setting()


class Shape(NamedTuple):
    """Out-features and in-features."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class Decoder:
    """A Llama: `hidden`, `intermediate`, `heads`, `key_value_heads` as in `LlamaConfig`, and its number of layers."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int = 1024

    @property
    def linears(self) -> list[Shape]:
        """The seven linear layers of one decoder layer."""
        narrow = self.hidden // self.heads * self.key_value_heads
        square, up = Shape(self.hidden, self.hidden), Shape(self.intermediate, self.hidden)
        return [square, square, *[Shape(narrow, self.hidden)] * 2, up, up, Shape(self.hidden, self.intermediate)]


@dataclass
class Job:
    """Something to time: one phase of a contender's work.

    Attributes:
        contender: its name; `hqq_oft` is what everything else is compared with.
        call: runs it with one of the `copies` sets of buffers; None if `columns` already holds the result.
        passes: what it must do at least (see `bench.model`).
        graph: whether it may be captured in a CUDA graph.
        columns: more of its row: an error against float64, memory kept, `status` if it cannot run.
    """

    contender: str
    phase: str = ""
    call: Call | None = None
    passes: tuple[model.Cost, ...] = ()
    copies: int = 1
    graph: bool = False
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How cases of a kind are named (a format of their parameters) and become jobs, within `context`.

    `operations` are those whose tests must pass before a figure is reported.
    """

    suite: str
    name: str
    operations: frozenset[str]
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
        found: dict[str, Any] = {}
        for name, value in self.parameters.items():
            if isinstance(value, Setting):
                found |= asdict(value)
            elif isinstance(value, Shape) or name == "m":
                found |= {"M": value} if name == "m" else {"N": value.n, "K": value.k}
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
    """Relative error against float64.

    Raises:
        RuntimeError: it is so large that something else was computed.
    """
    if out.shape != truth.shape:
        raise RuntimeError(f"{name} returns {tuple(out.shape)} instead of {tuple(truth.shape)}")
    found = relative_error(out, truth)
    bound = (TOLERANCE if name.startswith(OURS) else TOLERANCE_OF_OTHERS)[dtype]
    if not found <= bound:
        raise RuntimeError(f"{name} is {found:.2e} off float64, more than {bound:.0e}")
    return found


# --- Layers ----------------------------------------------------------------------------------------------------------


@kind("layer", "{shape} M={m} {setting.label}{note}", PRODUCT)
def layer(session: Any, shape: Shape, m: int, setting: Setting, against: tuple[str, ...], note: str) -> Iterator[Job]:
    """One layer against what a user would pick instead: forward in inference; forward and backward in training."""
    # A compiled layer is one more compilation for each set of buffers: it has one.
    copies = 1 if "compiled" in note else session.copies(setting.layer(*shape).weight_bytes)
    # Once for all numbers of tokens.
    make = partial(Problem, *shape, setting, session.device, copies)
    problem, built = session.keep((shape, setting, against), lambda: (make(), {}))
    inputs = problem.inputs(m)
    truths = {rotates: problem.truth(inputs[0][:CHECKED_ROWS], rotates) for rotates in (True, False)}
    for name in against:
        try:
            contender = built[name] = built.get(name) or contenders.build(name, problem)
            if m <= DECODE_UP_TO or not contender.decodes_only:
                yield from _layer_jobs(contender, problem, inputs, truths[contender.rotates], session.limits)
        except Exception as error:  # of code that is not ours costs its own row only
            if name == OURS:
                raise
            yield Job(name, columns={"status": contenders.failure(error)})


def _layer_jobs(
    contender: Contender, problem: Problem, inputs: list[Tensor], truth: Tensor, limits: Limits
) -> Iterator[Job]:
    m, name, layers, cost = len(inputs[0]), contender.name, contender.layers, problem.layer
    cost = cost if contender.rotates else replace(cost, block=None)
    # A gradient reaches the input as it does inside a model.
    leaves = [x.detach().requires_grad_() for x in inputs]

    @torch.no_grad()
    def inference(number: int) -> Tensor:
        return layers[number](inputs[number])

    def full(number: int) -> object:
        y = layers[number](leaves[number])
        return torch.autograd.grad(y, contender.wanted(number, leaves[number]), grads[number])

    columns = {"error": check(name, inference(0)[:CHECKED_ROWS], truth, problem.dtype)}
    ahead = contenders.forward_passes(name, cost, m, limits)
    yield Job(name, "forward", inference, ahead, len(inputs), not contender.compiled, columns)
    if m < TRAINING_FROM or contender.decodes_only:
        return
    grads = [torch.randn(m, problem.n, device=problem.device).to(problem.dtype) for _ in inputs]
    ahead = contenders.forward_passes(name, cost, m, limits, training=True)
    back = contenders.backward_passes(name, cost, m, limits)
    columns = columns | {"kept_mib": kept_mib(lambda: layers[0](leaves[0]))}
    yield Job(name, "full", full, (*ahead, *back), len(inputs), not contender.compiled, columns)
    if not contender.compiled:
        backward = partial(torch.autograd.grad, layers[0](leaves[0]), contender.wanted(0, leaves[0]), grads[0], True)
        yield Job(name, "backward", called(backward), back, columns=columns)


def called(way: Callable[[], object]) -> Call:
    return lambda _: way()


def _ungraded(way: Callable[[], object]) -> Call:
    return called(torch.no_grad()(way))


# --- Operations ------------------------------------------------------------------------------------------------------


def peft_rotation(problem: Problem) -> OFTRotationModule:
    """PEFT's module that computes and applies a rotation."""
    setting, b = problem.setting, problem.setting.block
    blocks = 1 if setting.share else problem.k // b
    options = {"block_share": setting.share, "use_cayley_neumann": not setting.exact, "num_cayley_neumann_terms": 5}
    module = OFTRotationModule(blocks, b * (b - 1) // 2, b, problem.k, **options).to(problem.device)
    module.weight = nn.Parameter(problem.v.clone())
    return module


@kind("ops", "cayley K={k} {setting.label}{note}", "cayley cayley_backward")
def cayley(session: Any, k: int, setting: Setting, note: str) -> Iterator[Job]:
    """v to D and back, against PEFT's."""
    problem = Problem(k, k, setting, session.device)
    b, terms, cost = setting.block, setting.terms, problem.layer
    v, module = problem.v.clone().requires_grad_(), peft_rotation(problem)
    batch = torch.compile(module._cayley_batch, dynamic=False) if note else module._cayley_batch
    ways: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        OURS: (lambda: functional.cayley(v, block_size=b, terms=terms, dtype=problem.dtype), v),
        "PEFT" + note: (lambda: batch(module.weight, b, not setting.exact, 5), module.weight),
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
    modules = {k: peft_rotation(Problem(k, k, MAIN, session.device)) for k in dict.fromkeys(features)}
    cost = sum((model.cayley(MAIN.layer(k, k), 5) for k in features), model.Cost(0, 0))
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: functional.cayley_many(vs, block_size=b, dtype=torch.bfloat16),
        f"{OURS}, one by one": lambda: [functional.cayley(v, block_size=b, dtype=torch.bfloat16) for v in vs],
        "PEFT": lambda: [modules[k]._cayley_batch(v, b, True, 5) for k, v in zip(features, vs, strict=True)],
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
    copies = session.copies(setting.layer(*shape).weight_bytes)
    problem = Problem(*shape, setting, session.device, copies)
    cost, d, dtype = problem.layer, problem.d, problem.dtype
    weights, hqq = problem.weights, [hqq_layer(weight, dtype) for weight in problem.weights]
    dense = [problem.dense, *(problem.dense.clone() for _ in range(copies - 1))]
    truth = reference.dequantize_rotate(weights[0], d.double(), torch.float64)
    error = {"error": check(OURS, ops.dequantize_rotate(weights[0], d, dtype), truth, dtype)}
    flat, rotated = (model.dequantize(cost),), (model.dequantize_rotate(cost),)
    ways: tuple[tuple[str, str, Call, tuple[model.Cost, ...]], ...] = (
        (OURS, "dequantize_rotate", lambda i: ops.dequantize_rotate(weights[i], d, dtype), rotated),
        ("HQQ + plain rotation", "dequantize_rotate", lambda i: rotate_blocks(hqq[i].dequantize(), d.mT), rotated),
        (OURS, "dequantize", lambda i: ops.dequantize(weights[i], dtype), flat),
        (HQQ, "dequantize", lambda i: hqq[i].dequantize(), flat),
        ("copy", "dequantize", lambda i: dense[i].clone(), (model.copy(cost),)),
    )
    for name, phase, way, passes in ways:
        yield Job(name, phase, way, passes, copies, True, error if (name, phase) == (OURS, "dequantize_rotate") else {})


# --- Merging ---------------------------------------------------------------------------------------------------------

MERGE = "cayley dequantize dequantize_rotate rotate"
DENSE_ROTATION_LIMIT = 4 << 30  # bytes of PEFT's K x K matrix, of which it makes several


def _folded(problem: Problem) -> Tensor:
    """`W R^T` in the layer's dtype: the result of a merge into a dense layer."""
    d = functional.cayley(problem.v, block_size=MAIN.block, dtype=problem.dtype)
    return functional.dequantize_rotate(problem.weights[0], d, problem.dtype)


def _thawed(problem: Problem) -> nn.Module:
    found = contenders.build(OURS, problem).layers[0]
    found.rotations_frozen = False
    return found


def _merge_and_unmerge(layers: list[nn.Module]) -> None:
    for one in layers:
        one.merge()
    for one in layers:
        one.unmerge()


@kind("merge", "{shape} {setting.label}", MERGE)
def merge(session: Any, shape: Shape, setting: Setting) -> Iterator[Job]:
    """The part of a merge that rotates the weight, the part that quantizes it again, and all of it."""
    problem = Problem(*shape, setting, session.device)
    (n, k), cost, ours, peft = shape, problem.layer, _thawed(problem), contenders.build(PEFT, problem).layers[0]

    def rotated() -> Tensor:
        return rotate_weight(problem.weights[0], [("default", ours._rotation("default"))], check=False)

    def peft_rotated(_: int) -> Tensor:  # a dense K x K rotation and a dense product
        delta = peft.get_delta_weight("default")
        return torch.mm(delta, peft.get_base_layer().dequantize().transpose(0, 1).to(delta.dtype)).transpose(0, 1)

    dense, copy = rotated(), problem.dense.clone()
    wide = (model.Cost(cost.weight_bytes + 4 * n * k + 4 * k * setting.block, 2 * n * k * (1 + setting.block)),)
    fold, moved = (model.dequantize_rotate(cost),), (model.copy(cost),)
    only = "rotate without requantizing"
    yield Job(OURS, "rotate", lambda _: rotated(), wide)
    yield Job(OURS, only, torch.no_grad()(lambda _: _folded(problem)), fold)
    yield Job("copy", only, lambda _: copy.copy_(problem.dense), moved)
    yield Job("copy, new memory", only, lambda _: problem.dense.clone(), moved)  # whose pages a CPU clears first
    yield Job(HQQ, "requantize", lambda _: requantize(ours.get_base_layer(), dense))
    yield Job(OURS, "whole", lambda _: _merge_and_unmerge([ours]))
    if 4 * k * k <= DENSE_ROTATION_LIMIT:
        yield Job("PEFT", "rotate", torch.no_grad()(peft_rotated), wide)


@kind("merge", "a decoder layer of width {decoder.hidden}", MERGE)
def merge_decoder(session: Any, decoder: Decoder) -> Iterator[Job]:
    """Rotating the seven weights of a decoder layer, and merging them."""
    problems = [Problem(*shape, MAIN, session.device) for shape in decoder.linears]
    layers = [_thawed(problem) for problem in problems]
    costs = tuple(model.dequantize_rotate(problem.layer) for problem in problems)
    fold = torch.no_grad()(lambda _: [_folded(problem) for problem in problems])
    yield Job(OURS, "rotate without requantizing", fold, costs)
    yield Job(OURS, "whole", lambda _: _merge_and_unmerge(layers))


# --- Overhead of the host --------------------------------------------------------------------------------------------

CHOICES = (OURS, DENSE, HQQ, PEFT, LORA)  # what a user picks from
TINY, SMALL, LARGE = 64, 128, 4096  # in- and out-features


def _host(session: Any, name: str, size: int, m: int, note: str, checked: bool) -> Iterator[Job]:
    problem = Problem(size, size, MAIN, session.device)
    contender = contenders.build(name, problem)
    called, x = contender.layers[0], problem.inputs(m)[0]
    columns = {"note": note, **problem.facts}
    if checked:
        out = torch.no_grad()(called)(x)
        columns["error"] = check(name, out, problem.truth(x, contender.rotates), problem.dtype)
    if name == OURS:
        called.rotations_frozen = False  # as by default
    called.train(m > 1)
    x = x.view(1, m, size)
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def full(_: int) -> object:
        return torch.autograd.grad(called(leaf), contender.wanted(0, leaf), grad)

    def inference(_: int) -> Tensor:
        with torch.no_grad():
            return called(x)

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
