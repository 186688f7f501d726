"""Operators over compiled kernels: opcheck, compile, refusals, the choice of an instruction set."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import subprocess
import sys
import weakref

import calls
import pytest
import torch
from helpers import COMPILE_BACKEND, oft_layer, relative_error

from hqq_oft import BackendError, Unsupported, backend, functional
from hqq_oft.ops import native as _native


@pytest.mark.parametrize("case", range(21))
def test_opcheck(case):
    name, args = calls.examples()[case]
    if any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in calls.parts(args)):
        pytest.skip("float64 is left to the reference")
    torch.library.opcheck(getattr(torch.ops.hqq_oft, name).default, calls.parts(args))


@pytest.mark.parametrize("m", [5, 33])
def test_compile_without_graph_breaks_forward_and_backward(m):
    torch._dynamo.reset()
    layer, x = oft_layer(), torch.randn(m, 96)
    results = []
    for module in (layer, torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        out = module(inputs)
        out.square().sum().backward()
        results.append([out, inputs.grad, layer.oft_R["default"].weight.grad.clone()])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


def test_auto_selects_the_native_backend_on_the_cpu():
    computed, planner = [], _native.OPERATIONS["rotate"]

    def spied(by_name, *args):
        function = planner(by_name, *args)
        return lambda *args: computed.append(by_name) or function(*args)

    x, d = torch.randn(3, 8), torch.randn(2, 4, 4)
    with calls.planners_of("native", rotate=spied), backend("auto"):
        functional.rotate(x, d)
        functional.rotate(x, d)
    assert computed == [False, False]


def test_unsupported_calls_are_refused():
    x, d = torch.randn(3, 8, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    with pytest.raises(
        BackendError, match=r"does not support rotate: .* compute in float32, and a tensor is torch.float64"
    ):
        functional.rotate(x, d)
    with pytest.raises(BackendError, match=r"the requested dtype is torch.float64"):
        functional.cayley(torch.randn(2, 6), 4, dtype=torch.float64)
    with pytest.raises(Unsupported, match=r"run on the CPU, and a tensor is on meta"):
        _native.OPERATIONS["rotate"](True, torch.empty(3, 8, device="meta"), torch.empty(2, 4, 4), None, False)
    with backend("auto"):
        assert functional.rotate(x, d).dtype == torch.float64


def test_mismatched_shapes_raise_instead_of_reading_out_of_bounds():
    lib = torch.ops.hqq_oft_native
    x, d = torch.randn(3, 8), torch.randn(2, 4, 4)
    for args in ((x, d[:, :, :3], None, False), (x, d.repeat(2, 1, 1), None, False),
                 (x, d[None], torch.zeros(2, dtype=torch.int64), False)):  # fmt: skip
        with pytest.raises(RuntimeError):
            lib.rotate(*args)
    index = torch.zeros(3, dtype=torch.int64)
    packed, scale = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(8)
    weight = (packed, scale, scale, 8, 8, 4, 8, 1)
    v = torch.randn(2, 6)
    lib.rotate(x, d, None, False), lib.rotate(x, d[None], index, False), lib.linear(x, d, *weight, scale, None)
    for call, said in (
        (lambda: lib.rotate(x, d[:, :3], None, False), "square blocks"),
        (lambda: lib.rotate(x, d, index, False), "square blocks"),
        (lambda: lib.rotate_backward_in_place(x.new_empty(8, 3).t(), x, d, None), "must be contiguous"),
        (lambda: lib.rotate_backward(x, x[:2], d, None, False, True, True), "one shape"),
        (lambda: lib.linear(x, d, *weight, scale[:1], None), "entry per out-feature"),
        (lambda: lib.cayley(v, 4, 5, index[:2], None, torch.float32), "keep must be bool"),
        (lambda: lib.dequantize(packed, scale, scale, 8, 8, 4, 7, 1, torch.float32), "must divide the weight"),
        (lambda: lib.dequantize(packed, scale, scale, 8, 8, 0, 8, 1, torch.float32), "bits must be"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()
    with pytest.raises(RuntimeError, match="do not fit the weight's shape"):
        lib.dequantize(packed, scale, scale, 8, 16, 4, 8, 1, torch.float32)


def test_an_instruction_set_by_name():
    available = _native.cpu.instruction_sets()
    assert available[0] == "portable"
    with pytest.raises(ValueError, match=rf"no CPU kernels for 'sse9'; it has {', '.join(available)}"):
        _native.cpu.use_instruction_set("sse9")


@pytest.mark.parametrize("wanted", ["portable", "AVX512_BF16", "sse9"])
def test_the_environment_chooses_the_instruction_set(wanted):
    available = _native.cpu.instruction_sets()
    program = "from hqq_oft.ops import native as _native; print(_native.cpu.instruction_set())"
    environment = {**os.environ, "HQQ_OFT_CPU_ISA": wanted}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if wanted.lower() in available:
        assert run.stdout.strip() == wanted.lower(), run.stderr
    else:
        assert "ValueError: " in run.stderr
        assert ("HQQ_OFT_CPU_ISA='sse9' is not understood" if wanted == "sse9" else "it has portable") in run.stderr


# --- Kept weights ----------------------------------------------------------------------------------------------------


def kept(weight):
    """The library's handle for a weight that has been multiplied with several times; None if it keeps none."""
    return vars(weight).get("_kept") or None


@pytest.mark.parametrize(("bits", "axis"), [(8, 1), (4, 1), (4, 0), (3, 1), (2, 1), (1, 0)])
def test_a_weight_that_is_used_again_is_kept_and_gives_the_same_product(bits, axis):
    weight, x = calls.quantized_weight(bits=bits, axis=axis), torch.randn(3, 64)
    first = functional.linear(x, weight)
    assert kept(weight) is None
    for _ in range(3):
        assert torch.equal(functional.linear(x, weight), first)
    assert kept(weight)


def test_a_kept_weight_is_released_with_it():
    weight, x = calls.quantized_weight(), torch.randn(3, 64)
    alive = weakref.ref(weight.packed.untyped_storage())
    for _ in range(2):
        functional.linear(x, weight)
    handle = kept(weight)
    assert torch.equal(torch.ops.hqq_oft_native.linear_kept(x, None, handle, None, None), functional.linear(x, weight))
    del weight
    gc.collect()
    with pytest.raises(RuntimeError, match="no kept weight has this handle"):
        torch.ops.hqq_oft_native.linear_kept(x, None, handle, None, None)
    assert alive() is None


def test_a_weight_that_the_kernels_must_copy_is_not_kept():
    weight = calls.quantized_weight()
    scale = torch.tensor(0.5).expand(weight.groups)  # one scale for the whole weight
    weight, x = dataclasses.replace(weight, scale=scale), torch.randn(3, 64)
    dense = functional.dequantize(weight)
    for _ in range(3):
        assert relative_error(functional.linear(x, weight), x @ dense.T) <= 1e-5
        assert kept(weight) is None


def test_a_copy_of_a_kept_weight_has_a_handle_of_its_own():
    weight, x = calls.quantized_weight(), torch.randn(3, 64)
    for _ in range(2):
        expected = functional.linear(x, weight)
    copied = copy.deepcopy(weight)
    assert kept(copied) is None
    for _ in range(3):
        assert torch.equal(functional.linear(x, copied), expected)
    assert kept(copied) != kept(weight)
