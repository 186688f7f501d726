"""Gradient checkpointing and half precision in a training loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import adapted, layers, logits, relative_error
from small_llama import quantize, small_llama


def train(model, tokens, steps=8, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(module_dropout=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append(torch.cat([layer.oft_R["default"].weight.grad.flatten() for layer in layers(model)]))
    assert relative_error(grads[1], grads[0]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_and_unmerge(tokens, dtype):
    model = adapted(quantize(small_llama().to(dtype), dtype=dtype)).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    expected = logits(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
