"""Wrong shapes, dtypes and settings of an operation: the error says what is wrong."""

from __future__ import annotations

import pytest
import torch
from helpers import hqq_layer
from torch.autograd import forward_ad

import hqq_oft.ops.table  # noqa: F401  (registers the operators)
from hqq_oft import QuantizedWeight, backend, functional
from hqq_oft.ops import backends


def quantized_weight(out_features=24, in_features=32, **settings):
    settings = {"group_size": 16, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


V, D, X = torch.zeros(4, 28), torch.zeros(4, 8, 8), torch.zeros(2, 32)
BAD = [
    (lambda w: functional.cayley(torch.zeros(4, 28, dtype=torch.int64), 8), TypeError, "v must be a floating point"),
    (lambda w: functional.cayley(V, 9), ValueError, r"v must have shape \[stored blocks, 36\] for block_size=9"),
    (lambda w: functional.cayley(V[0], 8), ValueError, "v must have shape"),
    (lambda w: functional.cayley(V, 0), ValueError, "block_size must be at least 1"),
    (lambda w: functional.cayley(V, 8, 0), ValueError, "terms must be at least 1, or None"),
    (lambda w: functional.cayley(V, 8, keep=torch.ones(3, dtype=torch.bool)), ValueError, "keep must be a bool tensor"),
    (lambda w: functional.cayley(V, 8, keep=torch.ones(4)), ValueError, "keep must be a bool tensor"),
    (lambda w: functional.rotate(X.long(), D), TypeError, "x must be a floating point"),
    (lambda w: functional.rotate(X, D.long()), TypeError, "d must be a floating point"),
    (lambda w: functional.rotate(torch.tensor(1.0), D), ValueError, "got a scalar"),
    (lambda w: functional.rotate(X, D[:3]), ValueError, "got 3 blocks of 8"),
    (lambda w: functional.rotate(X, D[0]), ValueError, r"d must have shape \[blocks, b, b\]"),
    (lambda w: functional.rotate(torch.zeros(2, 30), D), ValueError, "d must rotate 30 features"),
    (
        lambda w: functional.rotate(X, D, adapter_index=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        "as adapter_index",
    ),
    (lambda w: functional.rotate(X, D[None], adapter_index=torch.zeros(3, dtype=torch.int64)), ValueError, r"\(2,\)"),
    (lambda w: functional.rotate(X, D[None], adapter_index=torch.zeros(2)), ValueError, "must be an int64 tensor"),
    (lambda w: functional.dequantize_rotate(w, D[:2]), ValueError, "d must rotate 32 features"),
    (lambda w: functional.linear(X[:, :31], w, d=D), ValueError, r"x must have shape \[..., 32\], got \(2, 31\)"),
    (lambda w: functional.linear(X.int(), w, d=D), TypeError, "x must be a floating point"),
    (lambda w: functional.linear(X, w, torch.zeros(3), d=D), ValueError, r"bias must have shape \(24,\)"),
    (lambda w: functional.linear(X, w, adapter_index=torch.zeros(2).long()), ValueError, "index requires d"),
    (lambda w: functional.oft_linear(X, w, v=V[:3], block_size=8), ValueError, "got 3 blocks of 8"),
    (lambda w: functional.oft_linear(X, w, v=V, block_size=7), ValueError, "v must have shape"),
    (lambda w: functional.oft_rotate(X[:, :24], V, block_size=8), ValueError, "v must rotate 24 features"),
    (lambda w: functional.oft_rotate(torch.tensor(1.0), V, block_size=8), ValueError, "got a scalar"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_says_what_is_wrong(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(quantized_weight())


@pytest.mark.parametrize("index", [[0, 2], [-2, 0]], ids=str)
@pytest.mark.parametrize("name", ["auto", "native", "triton", "reference"])
def test_an_adapter_index_out_of_range_is_refused_by_every_backend(name, index):
    if backends.registry()[name if name != "auto" else "reference"].why_not("linear"):
        pytest.skip(f"{name} has no kernels here")
    w, d, index = quantized_weight(), torch.stack([D, D]), torch.tensor(index)
    calls = (
        lambda x, index: functional.rotate(x, d, adapter_index=index),
        lambda x, index: functional.linear(x, w, d=d, adapter_index=index),
        torch.compile(lambda x, index: functional.linear(x, w, d=d, adapter_index=index), backend="eager"),
    )
    with backend(name):
        for call in calls:
            call(X, torch.tensor([1, -1]))  # the same kind of call, valid
            with pytest.raises(ValueError, match=f"from -1, .* to 1, .*got {min(index)} to {max(index)}"):
                call(X, index)
            with pytest.raises(ValueError, match="from -1"):
                call(X.clone().requires_grad_(), index)


@pytest.mark.parametrize("how", ["func", "dual"])
def test_forward_mode_differentiation_is_refused_not_dropped(how):
    x, d = torch.randn(3, 32), torch.randn(4, 8, 8) * 0.05
    weight = QuantizedWeight.from_hqq(hqq_layer(16, 32, optimize=False))

    def push_forward(function):
        if how == "func":
            return torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, x))

    for function in (lambda x: functional.rotate(x, d), lambda x: functional.linear(x, weight)):
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            push_forward(function)
