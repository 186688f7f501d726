"""Serving several adapters over one quantized model: mixed batches, adapters added and removed, memory freed."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import layers, live_bytes
from peft import OFTConfig, get_peft_model
from small_llama import VOCABULARY, quantized_llama

import hqq_oft

NAMES = ["first", "second", "__base__", "second"]


def config(**settings):
    return OFTConfig(
        r=0, oft_block_size=8, target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False, **settings
    )


@pytest.fixture
def served():
    torch.manual_seed(0)
    model = get_peft_model(quantized_llama(), config(use_cayley_neumann=True), adapter_name="first")
    model.add_adapter("second", config(use_cayley_neumann=True))
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(1))


def generate(model, tokens, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)


def alone(model, tokens, name):
    """The output for one sample with only this adapter active."""
    if name == "__base__":
        with model.disable_adapter():
            return generate(model, tokens)
    model.set_adapter(name)
    return generate(model, tokens)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_each_sample_of_a_batch_is_served_by_its_adapter(served, tokens, cache):
    mixed = generate(served, tokens, adapter_names=NAMES, cache_implementation=cache)
    for row, name in enumerate(NAMES):
        expected = alone(served, tokens[row : row + 1], name)[0]
        assert torch.equal(mixed[row, : len(expected)], expected)
    assert len({tuple(row.tolist()) for row in mixed[:, 5:]}) > 2  # the adapters give different outputs


def test_each_sample_is_served_by_its_adapter_with_frozen_rotations(served, tokens, launches):
    expected = generate(served, tokens, adapter_names=NAMES)
    with hqq_oft.frozen_rotations(served):
        for _ in range(2):
            assert torch.equal(generate(served, tokens, adapter_names=NAMES), expected)
        launches.clear()
        assert torch.equal(generate(served, tokens.flip(0), adapter_names=NAMES[::-1]), expected.flip(0))
        assert torch.equal(generate(served, tokens, adapter_names=NAMES), expected)
        assert "cayley" not in launches


def test_rotations_are_computed_once_for_all_tokens(served, tokens, launches):
    generate(served, tokens, adapter_names=NAMES)
    assert launches.count("cayley") == 2 * len(layers(served))
    generate(served, tokens, adapter_names=NAMES[::-1])
    assert launches.count("cayley") == 2 * len(layers(served))


def test_deleting_an_adapter_frees_its_memory(served, tokens):
    alone(served, tokens, "first")
    served.delete_adapter("second")
    without = live_bytes()
    served.add_adapter("second", config(use_cayley_neumann=True))
    served.eval()
    generate(served, tokens, adapter_names=NAMES)
    assert live_bytes() > without
    parameters = [weakref.ref(layer.oft_R["second"].weight) for layer in layers(served)]
    served.delete_adapter("second")
    assert live_bytes() == without  # parameters, rotations, and what was made for the mixed batch
    assert not any(ref() is not None for ref in parameters)
    assert torch.equal(generate(served, tokens[:1]), alone(served, tokens[:1], "first"))


def test_every_change_of_adapters_takes_effect_on_the_next_batch(served, tokens):
    """Add, switch, replace, train, load, remove: the next batch equals that of a model without cached state."""

    def serve(names):
        out = generate(served, tokens, adapter_names=names)
        fresh = copy.deepcopy(served)  # a copy starts without cached rotations
        for row, name in enumerate(names):
            for model in (fresh, served):
                expected = alone(model, tokens[row : row + 1], name)[0]
                assert torch.equal(out[row, : len(expected)], expected)

    serve(NAMES)
    served.add_adapter("third", config(use_cayley_neumann=True))
    served.eval()
    serve(["third", "first", "second", "third"])
    with torch.no_grad():
        for layer in layers(served):
            layer.oft_R["third"].weight.mul_(-1)
    serve(["third", "first", "second", "third"])
    served.delete_adapter("third")
    served.add_adapter("third", config())
    served.eval()
    serve(["third", "third", "__base__", "first"])
    served.train()
    served.set_adapter("first")
    served(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in served.parameters() if p.requires_grad], lr=1.0).step()
    served.eval()
    serve(NAMES)
    state = {name: value * 0.5 for name, value in served.state_dict().items() if "oft_R.second" in name}
    served.load_state_dict(state, strict=False)
    serve(NAMES)
