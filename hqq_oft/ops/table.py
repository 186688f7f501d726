"""The table of operations: for each its name, schema, fake implementation and precondition.

An operation takes a weight as one argument, a `QuantizedWeight`. `torch.library` schemas can't, so an operation takes
the weight apart when it is called through PyTorch's dispatcher and puts it together again behind it; this is the only
place that does. Where nothing but the caller observes the call, the dispatcher is skipped.

The derivatives are in `hqq_oft.functional`: call operations where autograd does not record. To `torch.compile` an
operator is opaque and traced through its fake implementation. Arguments and results are those of the functions of the
same name in `hqq_oft.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks
from .autocast import without_autocast
from .packing import LEVELS_PER_ELEMENT
from .reference import wide_dtype
from .weight import QuantizedWeight

_WEIGHT = "QuantizedWeight weight"
_PARTS = (
    "Tensor packed, Tensor scale, Tensor zero, SymInt out_features, SymInt in_features, int bits, SymInt group_size, "
    "int axis"
)
_PART_COUNT = len(_PARTS.split(","))
_MOST_PLANS = 4096  # of one operation; a server sees many lengths


class Operation:
    """One operation: callable as Python function, and registered as the operator `torch.ops.hqq_oft.<name>`.

    Args:
        name: of the operation, of the operator, and of the reference function.
        parameters: the schema's parameters, a weight written as `QuantizedWeight weight`.
        returns: the schema's result.
        fake: a function with the operation's arguments that allocates what the operation returns.
        check: a function with the operation's arguments that raises TypeError or ValueError for invalid ones.
        check_values: one that raises ValueError for invalid values of tensors, at every call that computes.
    """

    def __init__(
        self,
        name: str,
        parameters: str,
        returns: str,
        fake: Callable[..., Any],
        check: Callable[..., None],
        check_values: Callable[..., None] | None = None,
    ) -> None:
        self.name, self.schema = name, f"({parameters.replace(_WEIGHT, _PARTS)}) -> {returns}"
        names = parameters.split(", ")
        self._weight_at = names.index(_WEIGHT) if _WEIGHT in names else None
        self._check, self._check_values = check, check_values
        self._plans = backends.plans_of(name)
        operator = f"hqq_oft::{name}"
        torch.library.define(operator, self.schema)
        torch.library.impl(operator, "CompositeExplicitAutograd", self._run_parts)
        torch.library.register_fake(operator, lambda *args: fake(*self._put_together(args)))
        self._operator = getattr(torch.ops.hqq_oft, name).default

    def __call__(self, *args: Any) -> Any:
        """Check the arguments and compute, through the dispatcher if something observes the call.

        Raises:
            TypeError, ValueError: an argument is invalid.
            BackendError: the backend selected by name does not support the call.
        """
        key = None if _observed() else _key(args)
        if key is None:
            self._check(*args)
            return self._operator(*self._take_apart(args))
        return self._run(key, args)

    def _run_parts(self, *parts: Any) -> Any:
        args = self._put_together(parts)
        return self._run(_key(args), args)

    def _run(self, key: tuple[Any, ...] | None, args: tuple[Any, ...]) -> Any:
        plan = None if key is None else self._plans.get(key)
        if plan is None:
            self._check(*args)
            plan = backends.plan(self.name, backends.selected_backend() if key is None else key[0], args)
            if key is not None:
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        if self._check_values is not None:
            self._check_values(*args)
        with without_autocast(args[0].device):
            return plan(*args)

    def _take_apart(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        at = self._weight_at
        return args if at is None else (*args[:at], *args[at].arguments(), *args[at + 1 :])

    def _put_together(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        at = self._weight_at
        if at is None:
            return args
        return (*args[:at], QuantizedWeight.unchecked(*args[at : at + _PART_COUNT]), *args[at + _PART_COUNT :])


def _observed() -> bool:
    """Whether something besides the caller must see the call: a compiler, a tracer, a profiler, a mode, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def _key(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a plan depends on, or None if the dispatcher must decide: tensors without data, and tensor subclasses."""
    facts: list[Any] = [backends.selected_backend()]
    for value in args:
        if value is None:
            facts.append(None)
            continue
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if value.is_meta:
                return None
            try:
                # Triton compiles for pointers that 16 divides, and for others
                facts += (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % 16)
            except (
                RuntimeError
            ):  # a wrapper of a transform that has ended, as in the function that torch.func.vjp returns
                return None
        elif kind is QuantizedWeight:
            if value.layout is None:
                return None
            facts.append(value.layout)
        elif isinstance(value, Tensor):
            return None
        else:
            facts.append(value)
    return tuple(facts)


def _fake_linear_backward(
    grad: Tensor, x: Tensor, weight: QuantizedWeight, d: Tensor | None, index: Tensor | None, need_x: bool, need_d: bool
) -> tuple[Tensor, Tensor]:
    dx = grad.new_empty((grad.shape[0], weight.in_features) if need_x else 0)
    if d is None:
        return dx, grad.new_empty(0)
    return dx, d.new_empty(d.shape if need_d else 0, dtype=wide_dtype(x.dtype, d.dtype))


def _fake_quantize(
    w: Tensor,
    levels: int,
    bits: int,
    group_size: int,
    axis: int,
    round_zero: bool,
    iterations: int,
    dtype: torch.dtype,
    errors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = w.numel() // group_size
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    elements = (-(-rows // LEVELS_PER_ELEMENT[bits]), columns)
    per_group = (groups, 1) if axis == 1 else (1, groups)
    return (
        w.new_empty(elements, dtype=torch.int32 if bits == 3 else torch.uint8),
        w.new_empty(per_group, dtype=dtype),
        w.new_empty(per_group, dtype=dtype),
        w.new_empty(2, dtype=torch.float64),
        w.new_empty(iterations, dtype=torch.float64),
    )


cayley = Operation(
    "cayley",
    "Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm, ScalarType dtype",
    "Tensor",
    fake=lambda v, block_size, terms, keep, max_norm, dtype: v.new_empty(
        v.shape[0] if keep is None else keep.shape[0], block_size, block_size, dtype=dtype
    ),
    check=checks.cayley,
)
cayley_backward = Operation(
    "cayley_backward",
    "Tensor grad, Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm",
    "Tensor",
    fake=lambda grad, v, block_size, terms, keep, max_norm: v.new_empty(v.shape),
    check=checks.nothing,
)
project_ = Operation(
    "project_",
    "Tensor(a!) v, float max_norm",
    "()",
    fake=lambda v, max_norm: None,
    check=checks.project_,
)
rotate = Operation(
    "rotate",
    "Tensor x, Tensor d, Tensor? adapter_index, bool transpose",
    "Tensor",
    fake=lambda x, d, adapter_index, transpose: x.new_empty(x.shape),
    check=checks.rotate,
    check_values=lambda x, d, adapter_index, transpose: checks.index(d, adapter_index),
)
rotate_backward = Operation(
    "rotate_backward",
    "Tensor grad, Tensor x, Tensor d, Tensor? adapter_index, bool transpose, bool need_x, bool need_d",
    "(Tensor, Tensor)",
    fake=lambda grad, x, d, adapter_index, transpose, need_x, need_d: (
        grad.new_empty(grad.shape if need_x else 0),
        d.new_empty(d.shape if need_d else 0, dtype=wide_dtype(x.dtype, d.dtype)),
    ),
    check=checks.nothing,
)
dequantize = Operation(
    "dequantize",
    "QuantizedWeight weight, ScalarType dtype",
    "Tensor",
    fake=lambda weight, dtype: weight.packed.new_empty(weight.shape, dtype=dtype),
    check=checks.nothing,
)
dequantize_rotate = Operation(
    "dequantize_rotate",
    "QuantizedWeight weight, Tensor d, ScalarType dtype",
    "Tensor",
    fake=lambda weight, d, dtype: weight.packed.new_empty(weight.shape, dtype=dtype),
    check=checks.dequantize_rotate,
)
linear = Operation(
    "linear",
    "Tensor x, QuantizedWeight weight, Tensor? d, Tensor? bias, Tensor? adapter_index",
    "Tensor",
    fake=lambda x, weight, d, bias, adapter_index: x.new_empty(x.shape[0], weight.out_features),
    check=checks.linear,
    check_values=lambda x, weight, d, bias, adapter_index: checks.index(d, adapter_index),
)
linear_backward = Operation(
    "linear_backward",
    "Tensor grad, Tensor x, QuantizedWeight weight, Tensor? d, Tensor? adapter_index, bool need_x, bool need_d",
    "(Tensor, Tensor)",
    fake=_fake_linear_backward,
    check=checks.nothing,
)

quantize = Operation(
    "quantize",
    "Tensor w, int levels, int bits, SymInt group_size, int axis, bool round_zero, int iterations, ScalarType dtype, "
    "Tensor? errors",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_quantize,
    check=checks.quantize,
)

_ALL = (
    cayley,
    cayley_backward,
    project_,
    rotate,
    rotate_backward,
    dequantize,
    dequantize_rotate,
    linear,
    linear_backward,
    quantize,
)
OPERATIONS = {operation.name: operation for operation in _ALL}
