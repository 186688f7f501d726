"""`torch.compile` of a layer."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    COMPILE_BACKEND,
    add_adapter,
    around_operations,
    oft_layer,
    relative_error,
)

from hqq_oft import frozen_rotations


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "state",
    [
        "train",
        "mixed",
        *(pytest.param(s, marks=pytest.mark.all_targets) for s in ("eval", "merged", "disabled", "autocast")),
    ],
)
def test_compile_in_every_state(state):
    settings = {"module_dropout": 0.5, "coft": True, "eps": 0.5, "std": 0.2}
    layer = oft_layer(adapter="a", **settings)
    add_adapter(layer, "b", block_share=True)
    layer.set_adapter(["a", "b"])
    layer.train(state == "train")
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    compiled = torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)
    for rows in (4, 7, 1):
        x = torch.randn(rows, 96)
        kwargs = {"adapter_names": ["a", "b", "__base__", "a"][:rows]} if state == "mixed" and rows < 5 else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == "autocast"):
            outputs = []
            for module in (layer, compiled):
                torch.manual_seed(rows)
                outputs.append(module(x, **kwargs))
        if state == "train":  # random numbers differ under Inductor: only that it runs, and drops something
            assert not torch.equal(compiled(x), compiled(x))
        else:
            assert relative_error(outputs[1], outputs[0]) <= 1e-5


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_without_graph_breaks():
    layer = oft_layer(adapter="a", module_dropout=0.0)
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 96, requires_grad=True)
    grads = []
    for module in (layer, torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        module(x).square().sum().backward()
        grads.append([x.grad, layer.oft_R["a"].weight.grad.clone(), layer.oft_R["b"].weight.grad.clone()])
    for eager, compiled in zip(*grads, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_layer_reads_its_frozen_rotations():
    layer, x, called = oft_layer(adapter="a").eval(), torch.randn(4, 96), []
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    def counted(name, function, args):
        called.append(name)
        return function(*args)

    def calls_of_a_forward():
        called.clear()
        with torch.no_grad(), around_operations(counted):
            out = compiled(x)
        with torch.no_grad():
            assert relative_error(out, layer(x)) <= 1e-5
        return [*called]

    assert calls_of_a_forward().count("cayley") == 2
    for _ in range(2):  # with other rotations the second time
        with frozen_rotations(layer):
            assert calls_of_a_forward() == calls_of_a_forward() == ["rotate", "linear"]
        torch.nn.init.normal_(layer.oft_R["a"].weight, std=0.1)
        assert calls_of_a_forward().count("cayley") == 2
