"""Every operation on `cuda` FakeTensors: what `torch.compile` and `torch.export` rely on."""

from __future__ import annotations

import calls
import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from hqq_oft.ops.table import OPERATIONS

from .problem import described, differentiable, forward_and_backward, leaves, moved

EXAMPLES = calls.examples()
DIFFERENTIABLE = differentiable()


@pytest.fixture
def fake():
    """Makes a FakeTensor on the device, with the strides and the need for a gradient of a tensor."""
    mode = FakeTensorMode()

    def move(t):
        with mode:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        return made.requires_grad_(t.requires_grad)

    move.mode = mode
    return move


def on_device(results):
    return all(result is None or result.device == torch.device("cuda", 0) for result in results)


@pytest.mark.parametrize("case", range(len(EXAMPLES)), ids=[name for name, _ in EXAMPLES])
def test_operations(fake, case):
    name, args = EXAMPLES[case]
    expected = OPERATIONS[name](*args)
    with fake.mode:
        out = OPERATIONS[name](*moved(args, fake))
    assert described(out) == described(expected)
    assert on_device(out if isinstance(out, tuple) else (out,))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_and_backward(fake, name):
    function, args = DIFFERENTIABLE[name]
    expected = forward_and_backward(function, args)
    with fake.mode:
        results = forward_and_backward(function, moved(args, fake))
    assert described(results) == described(expected)
    assert on_device(results)


class Call(nn.Module):
    """A call whose inputs are its tensors, those of a weight among them."""

    def __init__(self, function, args):
        super().__init__()
        self.function, self.args = function, args

    def forward(self, *inputs):
        left = iter(inputs)
        return self.function(*moved(self.args, lambda _: next(left)))


def inputs_of(args):
    return tuple(part for part in calls.parts(args) if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_export(fake, name):
    function, args = DIFFERENTIABLE[name]
    expected = function(*args)
    faked = moved(args, fake)
    program = torch.export.export(Call(function, faked), inputs_of(faked))
    (output,) = program.graph.output_node().args[0]
    assert described(output.meta["val"]) == described(expected)
    assert on_device([output.meta["val"]])
    assert any("hqq_oft" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", [name for name, (_, args) in DIFFERENTIABLE.items() if leaves(args)])
def test_exported_forward_and_backward(fake, name):
    function, args = DIFFERENTIABLE[name]
    expected = forward_and_backward(function, args)
    faked = moved(args, fake)
    call = Call(function, faked)
    # views of an output, such as a reshaped one, are not supported there
    graph = aot_export_joint_simple(lambda *inputs: (call(*inputs).clone(),), inputs_of(faked), trace_joint=True)
    outputs = [node.meta["val"] for node in graph.graph.output_node().args[0] if node is not None]
    assert described(outputs) == described(expected)
    assert on_device(outputs)
