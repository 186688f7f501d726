"""Long use: memory stays constant, and the final state is correct."""

from __future__ import annotations

import copy
import resource
import sys

import pytest
import torch
from helpers import add_adapter, hqq_layer, live_bytes, oft_layer, packed_bytes, same_bytes
from peft import OFTConfig, get_peft_model
from small_llama import VOCABULARY, quantized_llama

import hqq_oft
from hqq_oft import HqqOFTLinear

CYCLES = 200
STEPS = 2000


def resident() -> int:
    """Bytes of memory that the process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


@linux
@pytest.mark.parametrize("shared", [False, True])
def test_training_does_not_leak_memory_and_is_reproducible(shared):
    """Half of all the steps, as the same run twice, in which memory is compared early and at the end."""
    settings = {"module_dropout": 0.25, "coft": True, "eps": 1.0} if not shared else {}
    results = []
    for _ in range(2):
        with hqq_oft.patch_peft():
            torch.manual_seed(0)
            config = OFTConfig(
                r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"], use_cayley_neumann=True, **settings
            )
            base = quantized_llama()
            del base.model.layers[1:]
            model = get_peft_model(base, config).train()
        if shared:
            hqq_oft.share_rotations(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        tokens = torch.randint(0, VOCABULARY, (1, 8))
        memory = []
        for step in range(STEPS // 4):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (STEPS // 16, STEPS // 4 - 1):
                memory.append((live_bytes(), resident()))
        results.append([p.detach().clone() for p in trained])
        check_flat(memory)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_flat(memory):
    (tensors, pages), (tensors_later, pages_later) = memory
    assert tensors_later <= tensors
    assert pages_later - pages < 8 * 2**20  # the allocator's own slack


@linux
def test_repeated_merging_and_unmerging_is_exact_and_does_not_leak_memory():
    layer = oft_layer(hqq_layer(64, 96), adapter="a").eval()
    add_adapter(layer, "b", oft_block_size=4)
    x, pristine = torch.randn(3, 96), packed_bytes(layer.get_base_layer())
    with torch.no_grad():
        expected = {names: outputs(layer, names, x) for names in (("a",), ("b",), ("a", "b"))}
        memory = []
        for cycle in range(CYCLES):
            names = list(expected)[cycle % 3]
            plain, merged = outputs(layer, names, x)
            assert torch.equal(plain, expected[names][0])
            assert torch.equal(merged, expected[names][1])
            if cycle in (CYCLES // 4, CYCLES - 1):
                memory.append((live_bytes(), resident()))
    assert same_bytes(layer.get_base_layer(), pristine)
    check_flat(memory)


def outputs(layer: HqqOFTLinear, names, x):
    """What a layer computes with these adapters active, and with them merged; it ends unmerged."""
    layer.set_adapter(list(names))
    plain = layer(x)
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    return plain, merged


@linux
def test_added_and_deleted_adapters_do_not_leak_memory():
    layer = oft_layer(adapter="kept").eval()
    x, memory = torch.randn(3, 96), []
    with torch.no_grad():
        expected = layer(x)
        for cycle in range(CYCLES):
            add_adapter(layer, "guest")
            layer.set_adapter("guest")
            assert not torch.equal(layer(x), expected)
            layer(x, adapter_names=["guest", "kept", "__base__"])
            layer.set_adapter("kept")
            layer.delete_adapter("guest")
            assert torch.equal(layer(x), expected)
            copy.deepcopy(layer)
            if cycle in (CYCLES // 4, CYCLES - 1):
                memory.append((live_bytes(), resident()))
    check_flat(memory)
