"""Calls of one kind are planned once, and a call that something observes goes through PyTorch's dispatcher."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any, ClassVar

import calls
import pytest
import torch
from helpers import hqq_layer
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hqq_oft
from hqq_oft import BackendError, QuantizedWeight, Unsupported, functional
from hqq_oft.ops import backends, reference
from hqq_oft.ops import table as ops


def quantized_weight(out_features=24, in_features=32, **settings):
    settings = {"group_size": 16, "optimize": False, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


def rotated(x, rotations):
    """`rotate`, without the derivative's node."""
    with torch.no_grad():
        return functional.rotate(x, rotations)


@pytest.fixture
def planned():
    """The plans made of `rotate` and `linear` on the reference backend, as (name, dtype and shape of x)."""
    made = []

    def planner(name):
        def plan(by_name, x, *args):
            made.append((name, x.dtype, tuple(x.shape)))
            return getattr(reference, name)

        return plan

    with (
        calls.planners_of("reference", rotate=planner("rotate"), linear=planner("linear")),
        hqq_oft.backend("reference"),
    ):
        yield made


X, D = torch.randn(6, 32), torch.randn(4, 8, 8)


# --- When a call is planned ------------------------------------------------------------------------------------------


def test_two_calls_of_one_kind_share_a_plan(planned):
    for x in (X, X.clone(), torch.nn.Parameter(X.clone(), requires_grad=False)):
        assert torch.equal(rotated(x, D), reference.rotate(x, D, None, False))
    assert len(planned) == 1


@pytest.mark.parametrize(
    ("x", "d"),
    [
        (X[:5], D),
        (X.double(), D),
        (X.bfloat16(), D),
        (X.t().contiguous().t(), D),
        (torch.randn(6, 40)[:, :32], D),
        (torch.randn(6 * 32 + 1)[1:].view(6, 32), D),  # not aligned to 16 bytes
        (X, D[:1]),
        (X, D.double()),
        (X, D.mT.contiguous().mT),
    ],
    ids=["rows", "wider", "narrower", "strides", "row stride", "alignment", "blocks", "dtype of d", "strides of d"],
)
def test_a_call_of_another_kind_is_planned_again(planned, x, d):
    rotated(X, D)
    assert torch.equal(rotated(x, d), reference.rotate(x, d, None, False))
    assert len(planned) == 2
    rotated(x, d)
    rotated(X, D)
    assert len(planned) == 2


def test_settings_and_optional_arguments_are_part_of_the_kind(planned):
    index = torch.zeros(6, dtype=torch.int64)
    for transpose, d, adapter_index in ((False, D, None), (True, D, None), (False, D[None], index)):
        for _ in range(2):
            out = functional.rotate(X, d, transpose=transpose, adapter_index=adapter_index)
            assert torch.equal(out, reference.rotate(X, d, adapter_index, transpose))
    assert len(planned) == 3


def test_weights_of_one_kind_share_a_plan(planned):
    first, second, other = quantized_weight(), quantized_weight(), quantized_weight(group_size=8)
    for weight in (first, second):
        assert torch.equal(functional.linear(X, weight), reference.linear(X, weight, None, None, None))
    assert len(planned) == 1
    functional.linear(X, other)
    functional.linear(X, quantized_weight(axis=0))
    functional.linear(X, replace(first, scale=first.scale.double()))
    functional.linear(X, first, torch.zeros(24))
    assert len(planned) == 5


def test_forgotten_plans_are_made_again(planned):
    rotated(X, D)
    backends.forget_plans()
    rotated(X, D)
    assert len(planned) == 2


def test_each_selection_of_a_backend_has_its_own_plans():
    computed = []

    def planner(by_name, *args):
        computed.append(by_name)
        return lambda x, *args: torch.full_like(x, 1.0 + by_name)

    with calls.planners_of("native", rotate=planner):
        for _ in range(2):
            with hqq_oft.backend("auto"):
                assert torch.equal(rotated(X, D), torch.full_like(X, 1.0))
            with hqq_oft.backend("native"):
                assert torch.equal(rotated(X, D), torch.full_like(X, 2.0))
            with hqq_oft.backend("reference"):
                assert torch.equal(rotated(X, D), reference.rotate(X, D, None, False))
    assert computed == [False, True]


def test_a_refusal_by_name_is_raised_at_every_call():
    def picky(by_name, *args):
        raise Unsupported("no tensor cores")

    with calls.planners_of("native", rotate=picky), hqq_oft.backend("native"):
        for _ in range(2):
            with pytest.raises(BackendError, match="does not support rotate: no tensor cores"):
                rotated(X, D)


def test_an_invalid_call_raises_however_often_it_is_repeated(planned):
    for _ in range(2):
        with pytest.raises(ValueError, match="got 3 blocks of 8"):
            rotated(X, D[:3])
    assert planned == []


def test_the_operator_shares_the_plans_of_the_function(planned):
    weight = quantized_weight()
    args = calls.linear(X, weight, D)
    first, second = ops.linear(*args), torch.ops.hqq_oft.linear(*calls.parts(args))
    assert torch.equal(first, second)
    assert len(planned) == 1


# --- Who observes a call ---------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The operators of this package that run inside the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hqq_oft":
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_operator_and_changes_no_result():
    for name, args in calls.examples():
        expected = ops.OPERATIONS[name](*args)
        with Recorded() as recorded:
            out = ops.OPERATIONS[name](*args)
        assert recorded.seen == [getattr(torch.ops.hqq_oft, name).default]
        if out is None:  # in place
            out = expected = args[0]
        pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
        assert all(torch.equal(*pair) for pair in pairs)


def test_a_profiler_sees_the_operators():
    weight = quantized_weight()
    expected = functional.linear(X, weight, d=D)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(functional.linear(X, weight, d=D), expected)
    assert "hqq_oft::linear" in {event.key for event in profile.key_averages()}


def test_compile_traces_the_operators():
    weight, graphs = quantized_weight(), []

    def traced(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    def f(x):
        return functional.linear(functional.rotate(x, D), weight)

    torch._dynamo.reset()
    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        compiled = torch.compile(f, backend=aot_autograd(fw_compiler=traced), fullgraph=True)
        assert torch.equal(compiled(X), f(X))
    assert all(f"torch.ops.hqq_oft.{name}.default" in graphs[0] for name in ("rotate", "linear"))


def test_fake_tensors_compute_only_shapes(planned):
    with FakeTensorMode() as mode:
        weight = quantized_weight().arguments()
        weight = QuantizedWeight(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in weight))
        out = functional.linear(torch.empty(7, 32, dtype=torch.bfloat16), weight)
        assert (out.shape, out.dtype) == ((7, 24), torch.bfloat16)
        assert functional.rotate(torch.empty(7, 32), torch.empty(4, 8, 8)).shape == (7, 32)
    assert planned == []


@pytest.mark.parametrize("name", ["auto", "native", "reference"])
def test_meta_tensors_compute_only_shapes_on_every_backend(name):
    weight = quantized_weight().arguments()
    weight = QuantizedWeight(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in weight))
    x, d, index = torch.empty(7, 32, device="meta"), D[None].to("meta"), torch.zeros(7, device="meta").long()
    with hqq_oft.backend(name):
        for out in (functional.linear(x, weight), functional.linear(x, weight, d=d, adapter_index=index)):
            assert (out.shape, out.device.type) == ((7, 24), "meta")
        assert functional.rotate(x, d, adapter_index=index).shape == x.shape
        assert functional.dequantize(weight).shape == (24, 32)


def test_fake_tensors_outside_of_their_mode_compute_only_shapes(planned):
    mode = FakeTensorMode()
    x, d = mode.from_tensor(X), mode.from_tensor(D)
    assert type(functional.rotate(x, d)) is type(x)
    assert planned == []


def test_vmap_raises_where_a_derivative_is_recorded_and_else_calls_each_operator():
    batch, d = torch.randn(3, 6, 32), D.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: functional.rotate(x, d))(batch)
    out = torch.vmap(lambda x: functional.rotate(x, D))(batch)
    assert torch.equal(out, torch.stack([functional.rotate(x, D) for x in batch]))


class Logged(torch.Tensor):
    """A tensor around another one that notes the operators of this package that are applied to it."""

    seen: ClassVar[list[Any]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return func(*(arg.inner if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


@pytest.mark.parametrize("part", ["x", "scale"])
def test_a_tensor_subclass_is_handled_by_its_own_code(part):
    weight, x = quantized_weight(), X
    expected = functional.linear(x, weight, d=D)
    if part == "x":
        x = Logged(X)
    else:
        weight = replace(weight, scale=Logged(weight.scale))
    Logged.seen.clear()
    assert torch.equal(functional.linear(x, weight, d=D), expected)
    assert Logged.seen == [torch.ops.hqq_oft.linear.default]


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_weights_can_be_copied_and_pickled(copied):
    weight = quantized_weight()
    expected = functional.linear(X, weight, d=D)  # whatever a weight remembers of its first use
    other = copied(weight)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(other.arguments(), weight.arguments(), strict=True)
    )
    assert (copied is copy.copy) == (other.packed.data_ptr() == weight.packed.data_ptr())
    assert torch.equal(functional.linear(X, other, d=D), expected)


def test_weights_of_one_kind_have_equal_layouts():
    weight = quantized_weight()
    assert weight.layout == quantized_weight().layout
    shifted = torch.cat([weight.scale.new_zeros(1), weight.scale])[1:]
    for other in (
        quantized_weight(out_features=40),
        quantized_weight(nbits=8),
        quantized_weight(axis=0),
        quantized_weight(group_size=8),
        quantized_weight(dtype=torch.bfloat16),
        replace(weight, scale=shifted),  # not aligned to 16 bytes
        replace(weight, scale=weight.scale[:1].expand(len(weight.scale))),
        replace(weight, packed=weight.packed.t().contiguous().t()),
    ):
        assert other.layout is not None
        assert other.layout != weight.layout
    assert replace(weight, zero=Logged(weight.zero)).layout is None
