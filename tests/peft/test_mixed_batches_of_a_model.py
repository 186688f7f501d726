"""`adapter_names` through PEFT: each sample of a batch with its own adapter."""

from __future__ import annotations

import pytest
import torch
from helpers import adapted, around_operations, layers, logits, randomize, relative_error
from peft import OFTConfig


def two_tasks():
    model = adapted()
    model.add_adapter("second", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]))
    randomize(model, 0.1, "second")
    return model


def alone(model, tokens, name, call):
    if name == "__base__":
        with model.disable_adapter():
            return call(model, tokens)
    model.set_adapter(name)
    return call(model, tokens)


def test_adapter_names_in_forward_and_generate(tokens):
    model = two_tasks()
    names = ["second", "__base__", "default"]

    def generate(model, tokens, **kwargs):
        settings = {
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(tokens),
        }
        return model.generate(input_ids=tokens, **settings, **kwargs)

    mixed = logits(model, tokens, adapter_names=names)
    generated = generate(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        assert relative_error(mixed[row : row + 1], alone(model, tokens[row : row + 1], name, logits)) <= 1e-5
        assert torch.equal(generated[row : row + 1], alone(model, tokens[row : row + 1], name, generate))
    model.set_adapter("default")
    hooks = [layer._forward_pre_hooks for layer in layers(model)]
    assert not any(hooks)


def test_adapter_names_with_beam_search(tokens):
    model = two_tasks()

    def generate(model, tokens, **kwargs):
        settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings, **kwargs)

    names = ["default", "second", "__base__"]
    generated = generate(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        expected = alone(model, tokens[row : row + 1], name, generate)
        assert torch.equal(generated[row : row + 1, : expected.shape[1]], expected)


def test_errors_of_adapter_names(tokens):
    model = two_tasks()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        logits(model, tokens, adapter_names=["typo", "default", "default"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 3"):
        logits(model, tokens, adapter_names=["default"] * 2)
    with pytest.raises(TypeError, match="expected a list of str"):
        logits(model, tokens, adapter_names="default")
    with pytest.raises(ValueError, match="when the model is in training mode"):
        logits(model.train(), tokens, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        logits(model, tokens, adapter_names=["default"] * 3)
    assert not any(layer._forward_pre_hooks for layer in layers(model))


def test_all_layers_of_a_model_share_the_index_of_a_batch(tokens):
    model, indices = two_tasks(), {}

    def seen(name, function, args):
        if name in ("linear", "rotate") and args[-1 if name == "linear" else 2] is not None:
            index = args[-1 if name == "linear" else 2]
            indices.setdefault(tuple(index.unique().tolist()), set()).add(index.data_ptr())
        return function(*args)

    with around_operations(seen):
        for names in (["second", "__base__", "default"], ["default", "second", "second"]):
            indices.clear()
            logits(model, tokens, adapter_names=names)
            # one for each of the two block sizes
            assert sum(map(len, indices.values())) == 2
