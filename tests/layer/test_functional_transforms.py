"""`torch.func` on a layer: its gradients are those of autograd, and nothing of a transform stays in the layer."""

from __future__ import annotations

import pytest
import torch
from helpers import oft_layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called_before", [True, False])
def test_gradients_of_parameters_by_torch_func(training, called_before):
    layer, x = oft_layer(coft=True, eps=0.3).train(training), torch.randn(4, 96)
    if called_before:
        layer(x)
    name = "oft_R.default.weight"
    frozen = {key: value.detach() for key, value in layer.named_parameters() if key != name}
    trained = {name: layer.oft_R["default"].weight.detach().clone()}

    def loss(parameters):
        return torch.func.functional_call(layer, {**frozen, **parameters}, (x,)).square().sum()

    gradients, value = torch.func.grad_and_value(loss)(trained)
    expected = layer(x).square().sum()
    expected.backward()
    assert torch.equal(value, expected)
    assert torch.equal(gradients[name], layer.oft_R["default"].weight.grad)


def test_gradient_of_the_input_by_torch_func():
    layer, x = oft_layer().eval().requires_grad_(False), torch.randn(4, 96)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert torch.equal(gradient, leaf.grad)
