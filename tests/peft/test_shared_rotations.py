"""Rotations shared by the layers of a model: the same results with fewer launches, and the per-layer fallback."""

from __future__ import annotations

import copy
import threading

import helpers
import pytest
import torch
from helpers import COMPILE_BACKEND, layers
from peft import OFTConfig
from small_llama import quantized_llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import hqq_oft
from hqq_oft import functional, share_rotations
from hqq_oft.tuner import rotation_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 14


def adapted(dtype=torch.float32, **settings):
    settings = {"target_modules": TARGETS, "use_cayley_neumann": True, **settings}
    return helpers.adapted(quantized_llama(dtype=dtype), **settings).train()


def step(model, tokens):
    """The loss and every gradient of one step."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cayley_neumann": False},
        {"block_share": True},
        {"coft": True, "eps": 0.3},
        {"dtype": torch.bfloat16},
        {"module_dropout": 0.5},
    ],
    ids=["series", "exact", "block_share", "coft", "bfloat16", "dropout"],
)
def test_outputs_and_gradients_are_the_same_bit_for_bit(tokens, settings):
    model = adapted(**settings)
    expected, twin = step(model, tokens), copy.deepcopy(model)
    with share_rotations(twin):
        assert same(step(twin, tokens), expected)
        assert same(step(twin, tokens), expected)
    assert len(expected) == 1 + LAYERS


def test_one_launch_per_size_replaces_two_per_layer(tokens, launches):
    model = adapted()
    step(model, tokens)
    assert launches.count("cayley") == 2 * LAYERS
    launches.clear()
    with share_rotations(model):
        step(model, tokens)
    assert launches.count("cayley") == 1  # a block size, a series and a dtype: one kind
    launches.clear()
    step(model, tokens)
    assert launches.count("cayley") == 2 * LAYERS


def test_adapters_in_a_row_and_changed_parameters(tokens, launches):
    model = adapted()
    with hqq_oft.patch_peft():
        settings = {"oft_block_size": 4, "target_modules": ["q_proj"], "use_cayley_neumann": True}
        model.add_adapter("second", OFTConfig(r=0, **settings))
    model.base_model.set_adapter(["default", "second"])
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, twin)]
    share_rotations(twin)
    for _ in range(3):
        expected = step(model, tokens)
        launches.clear()
        assert same(step(twin, tokens), expected)
        assert launches.count("cayley") == 2
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_gradient_checkpointing_does_not_share(tokens, launches, reentrant):
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    expected = step(model, tokens)
    launches.clear()
    with share_rotations(model):
        assert same(step(model, tokens), expected)
    assert launches.count("cayley") == 1 + 2 * LAYERS - (0 if reentrant else LAYERS)


def test_a_layer_that_is_checkpointed_by_hand():
    layer = layers(adapted())[0]
    model = Twice(layer)
    x = torch.randn(2, layer.in_features, requires_grad=True)
    model(x).sum().backward()
    expected = layer.oft_R["default"].weight.grad.clone()
    layer.zero_grad()
    with share_rotations(model):
        model(x).sum().backward()
    assert torch.equal(layer.oft_R["default"].weight.grad, expected)


class Twice(nn.Module):
    """A layer called twice, once checkpointed."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).sum() * checkpoint(self.layer, x, use_reentrant=False)


def test_evaluation_and_merged_layers_do_not_share(tokens, launches):
    model = adapted().eval()
    with share_rotations(model), torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert launches.count("cayley") == LAYERS  # kept by each layer, as without sharing
        launches.clear()
        assert torch.equal(model(input_ids=tokens).logits, expected)
        assert "cayley" not in launches
        model.train()
        model.merge_adapter()
        launches.clear()
        model(input_ids=tokens)
        assert "cayley" not in launches


def test_a_parameter_changed_during_the_forward_is_recomputed():
    model = nn.Sequential(layers(adapted())[0])
    v, before = model[0].oft_R["default"].weight, []

    @torch.no_grad()
    def change(module, args):
        before.append(rotation_batch.current().rotation(v))
        v.mul_(2)

    x = torch.randn(2, model[0].in_features)
    hook = model[0].register_forward_pre_hook(change)
    with share_rotations(model):
        out = model(x)
    hook.remove()
    assert torch.equal(out, model(x))
    assert torch.equal(before[0], functional.cayley(v / 2, 8, terms=5))


@pytest.mark.parametrize("where", ["before the step", "in a layer"])
def test_a_failed_forward_ends_only_its_own_step(tokens, where):
    model, outer = adapted(), nn.Identity()
    share_rotations(model)
    rotation_batch.enter(rotation_batch.RotationStep(outer, []))
    if where == "before the step":
        hook = model.register_forward_pre_hook(fail, prepend=True)
    else:
        hook = layers(model)[3].register_forward_hook(fail)
    with pytest.raises(OSError):
        model(input_ids=tokens)
    assert rotation_batch.current().owner is outer
    rotation_batch.leave(outer)
    assert rotation_batch.current() is None
    hook.remove()


def test_a_step_left_open_by_an_interrupt_is_ended_by_the_next_forward(tokens):
    model = adapted()
    expected = step(model, tokens)
    share_rotations(model)
    hook = layers(model)[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens)
    hook.remove()
    assert same(step(model, tokens), expected)
    assert rotation_batch.current() is None


def fail(*args):
    raise OSError


def interrupt(*args):
    raise KeyboardInterrupt


def test_each_thread_has_its_own_step(tokens):
    models = [adapted() for _ in range(2)]
    expected = [step(model, tokens) for model in models]
    got: list = [None, None]

    def run(index):
        with share_rotations(models[index]):
            got[index] = [step(models[index], tokens) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(results, expected[index]) for index in range(2) for results in got[index])


def test_compiled_layers_do_not_share():
    torch._dynamo.reset()
    model = nn.Sequential(layers(adapted())[0])
    x = torch.randn(4, model[0].in_features)
    expected = model(x)
    with share_rotations(model):
        assert torch.allclose(torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True)(x), expected, atol=1e-5)


def test_sharing_in_a_model_without_oft_layers_raises():
    with pytest.raises(ValueError, match="no HqqOFTLinear or OFTLinear layer: there are no rotations to share"):
        share_rotations(nn.Linear(2, 2))
