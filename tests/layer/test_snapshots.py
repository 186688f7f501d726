"""A forward computes with one state of the layer, and notices what others change in it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from helpers import (
    around_operations,
    hqq_layer,
    oft_layer,
    packed_bytes,
    relative_error,
    same_bytes,
    truth,
    two_adapters,
)
from hqq.core.quantize import HQQLinear
from torch import nn

from hqq_oft import HqqOFTLinear
from hqq_oft.quant import hqq_layer as quant_layer
from hqq_oft.quant import quantizer
from hqq_oft.tuner import fold

HANGS = 60  # seconds; only a deadlock takes that long


def in_a_thread(function):
    """What a call returns in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(HANGS)
    assert not thread.is_alive(), "deadlock"
    return results[0]


@torch.no_grad()
@pytest.mark.parametrize("where", [(quantizer, "requantize"), (fold, "rotate_weight")], ids=lambda where: where[1])
def test_forwards_in_other_threads_go_on_during_a_slow_merge(monkeypatch, where):
    layer, x = two_adapters(), torch.randn(3, 96)
    module, name = where
    with torch.no_grad():
        expected, mixed = layer(x), layer(x, adapter_names=["a", "b", "__base__"])
    begun, may_end, function = threading.Event(), threading.Event(), getattr(module, name)

    def slow(*args, **kwargs):
        begun.set()
        assert may_end.wait(HANGS)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, slow)
    merging = threading.Thread(target=layer.merge, daemon=True)
    merging.start()
    try:
        assert begun.wait(HANGS)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(in_a_thread(torch.no_grad()(lambda: layer(x))), expected)
            batch = in_a_thread(torch.no_grad()(lambda: layer(x, adapter_names=["a", "b", "__base__"])))
        assert torch.equal(batch, mixed)
        assert not layer.merged
    finally:
        may_end.set()
        merging.join(HANGS)
    assert layer.merged_adapters == ["a", "b"]
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("action", ["merge", "unmerge"])
def test_no_forward_sees_a_half_installed_weight(monkeypatch, action):
    layer, x = two_adapters(), torch.randn(3, 96)
    unmerged = layer(x)
    layer.merge()
    merged = layer(x)
    if action == "merge":
        layer.unmerge()
    assert torch.equal(layer(x), unmerged if action == "merge" else merged)
    install, outputs, readers = quant_layer.PackedState.install, [], []

    def halfway(self, base):
        base.W_q = nn.Parameter(self.packed.detach().clone(), requires_grad=False)  # its scale and zero are to follow
        readers.append(threading.Thread(target=torch.no_grad()(lambda: outputs.append(layer(x))), daemon=True))
        readers[-1].start()
        readers[-1].join(0.2)  # it may wait for the change, or go on with the state from before
        install(self, base)

    monkeypatch.setattr(quant_layer.PackedState, "install", halfway)
    getattr(layer, action)()
    for reader in readers:
        reader.join(HANGS)
    assert len(outputs) == len(readers) == 1
    assert any(torch.equal(outputs[0], whole) for whole in (unmerged, merged))
    assert torch.equal(layer(x), merged if action == "merge" else unmerged)


def new_data(tensor, value):
    tensor.data = value


def replace_meta(base, **entries):
    base.meta = {**base.meta, **entries}


def cast_tensors(base, dtype):  # HQQ's own product needs them in the compute dtype
    base.bias = base.bias.to(dtype)
    base.meta.update(scale=base.meta["scale"].to(dtype), zero=base.meta["zero"].to(dtype), compute_dtype=dtype)


OUTSIDE = {
    "weight": lambda base: setattr(base, "W_q", nn.Parameter(base.W_q.flip(0), requires_grad=False)),
    "weight's data": lambda base: new_data(base.W_q, base.W_q.data.flip(0)),
    "weight in place": lambda base: base.W_q.data.copy_(base.W_q.data.flip(0)),
    "scale": lambda base: base.meta.update(scale=base.meta["scale"] * 2),
    "scale's data": lambda base: new_data(base.meta["scale"], base.meta["scale"] * 2),
    "scale in place": lambda base: base.meta["scale"].mul_(2),
    "zero": lambda base: base.meta.update(zero=base.meta["zero"] + 1),
    "zero's data": lambda base: new_data(base.meta["zero"], base.meta["zero"] + 1),
    "meta data": lambda base: replace_meta(base, scale=base.meta["scale"] * 2),
    "bias": lambda base: setattr(base, "bias", base.bias + 1),
    "bias as parameter": lambda base: (delattr(base, "bias"), setattr(base, "bias", nn.Parameter(torch.randn(64)))),
    "bias's data": lambda base: new_data(base.bias, base.bias.data + 1),
    "bias removed": lambda base: setattr(base, "bias", None),
    "compute dtype": lambda base: (setattr(base, "compute_dtype", torch.bfloat16), cast_tensors(base, torch.bfloat16)),
}


@torch.no_grad()
@pytest.mark.parametrize("state", ["active", "merged", "disabled"])
@pytest.mark.parametrize("change", OUTSIDE)
def test_a_change_of_the_hqq_layer_from_outside_is_noticed(change, state):
    layer, x = oft_layer(std=0.2).eval(), torch.randn(3, 96)
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    before = layer(x)
    OUTSIDE[change](layer.base_layer)
    after = layer(x)
    fresh = HqqOFTLinear(copy.deepcopy(layer.base_layer), "default", r=0, oft_block_size=8).eval()
    if state == "active":
        fresh.oft_R.load_state_dict(layer.oft_R.state_dict())
    else:
        fresh.enable_adapters(False)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(x))


@torch.no_grad()
def test_another_compute_dtype_is_noticed():
    layer, x = oft_layer(std=0.2).eval(), torch.randn(3, 96)
    before = layer(x)
    layer.base_layer.compute_dtype = torch.bfloat16
    after = layer(x)
    assert 0 < relative_error(after, before) <= 1e-2
    assert torch.equal(after, after.bfloat16().float())


@torch.no_grad()
def test_another_base_layer_is_noticed():
    layer, x = oft_layer(std=0.2).eval(), torch.randn(3, 96)
    layer(x)
    layer.base_layer = hqq_layer()
    after = layer(x)
    assert relative_error(after, truth(layer, x, "default")) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["merged", "disabled", "no adapter active"])
def test_without_a_rotation_the_product_is_hqqs_own(monkeypatch, dtype, state):
    layer, x = oft_layer(hqq_layer(dtype=dtype)).eval(), torch.randn(3, 96, dtype=dtype)
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    else:
        layer.set_adapter([])
    expected = layer.base_layer(x)
    products, forward, operations = [], HQQLinear.forward, []

    def counted(self, x):
        products.append(x)
        return forward(self, x)

    with around_operations(lambda name, function, args: operations.append(name) or function(*args)):
        for _ in range(2):
            assert torch.equal(layer(x), expected)
            monkeypatch.setattr(HQQLinear, "forward", counted)  # as `HQQLinear.set_backend`, in the second round
    assert len(products) == 1
    assert operations == []


def addresses(layer):
    tensors = [layer.base_layer.W_q, layer.base_layer.bias, *layer.oft_R.parameters()]
    tensors += [value for value in layer.base_layer.meta.values() if isinstance(value, torch.Tensor)]
    return {tensor.data_ptr() for tensor in tensors}


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_layer_that_has_run_shares_nothing_with_it(how, merged):
    layer, x = oft_layer(std=0.2).eval(), torch.randn(3, 96)
    pristine, size = packed_bytes(layer.base_layer), None
    unmerged = layer(x)
    if merged:
        layer.merge()
    size = len(pickle.dumps(layer))
    expected = layer(x)
    assert len(pickle.dumps(layer)) == size  # what a forward keeps is not stored
    if how == "deepcopy":
        clone = copy.deepcopy(layer)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        clone = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert not addresses(clone) & addresses(layer)
    for one, other in ((clone, layer), (layer, clone)):
        assert torch.equal(one(x), expected)
        kept = copy.deepcopy(one.base_layer)
        one.base_layer.meta["scale"].mul_(3)
        one.base_layer.W_q.data.zero_()
        assert not torch.equal(one(x), expected)
        assert torch.equal(other(x), expected)
        one.base_layer.meta["scale"].copy_(kept.meta["scale"])
        one.base_layer.W_q.data.copy_(kept.W_q)
    if merged:
        clone.unmerge()
        assert same_bytes(clone.base_layer, pristine)
        assert torch.equal(clone(x), unmerged)
        assert layer.merged
        assert torch.equal(layer(x), expected)
        layer.unmerge()
        clone.merge()
    else:
        clone.merge()
        assert not layer.merged
    assert torch.equal(layer(x), unmerged)
    assert clone.merged


@torch.no_grad()
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "mixed"])
def test_hooks_of_the_base_layer_run_with_the_base_layer_as_module(state):
    layer, x, seen = oft_layer(std=0.2).eval(), torch.randn(3, 96), []
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    names = {"adapter_names": ["default", "__base__", "default"]} if state == "mixed" else {}
    expected = layer(x, **names)
    base = layer.base_layer
    handles = [
        base.register_forward_pre_hook(lambda module, args: seen.append(("before", module))),
        base.register_forward_hook(lambda module, args, out: (seen.append(("after", module)), out * 2)[1]),
    ]
    assert torch.allclose(layer(x, **names), expected * 2, rtol=1e-4, atol=1e-5)
    assert [when for when, _ in seen] == ["before", "after"]
    assert all(module is base for _, module in seen)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(x, **names), expected)
    assert len(seen) == 2


def test_backward_hooks_of_the_base_layer_run():
    layer, x, seen = oft_layer(), torch.randn(3, 96, requires_grad=True), []
    layer(x)
    handle = layer.base_layer.register_full_backward_hook(lambda module, *gradients: seen.append(module))
    layer(x).sum().backward()
    assert len(seen) == 1
    assert seen[0] is layer.base_layer
    handle.remove()


def test_merging_into_a_dense_layer_names_what_does_it():
    layer = oft_layer()
    before = packed_bytes(layer.base_layer)
    with pytest.raises(ValueError, match=r'merged_linear\(\).*merge_and_unload\(into="dense"\)'):
        layer.merge(into="dense")
    assert not layer.merged
    assert same_bytes(layer.base_layer, before)


# --- Adapters and modules that change meanwhile ----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_hooks_of_the_base_layer_run_in_a_compiled_layer(first):
    torch._dynamo.reset()
    layer, x = oft_layer().eval(), torch.randn(3, 96)
    plain = layer(x).detach()
    layer = copy.deepcopy(layer)
    layer.base_layer.register_forward_hook(lambda module, args, out: out + 1000)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    runs = {"compiled": lambda: compiled(x), "eager": lambda: layer(x)}
    for name in (first, *(runs.keys() - {first})):
        assert relative_error(runs[name](), plain + 1000) <= 1e-6


def test_a_replaced_adapter_is_complete_when_a_forward_finds_it(monkeypatch):
    layer, seen = oft_layer(), []
    publish = torch.nn.ModuleDict.__setitem__

    def observed(modules, name, module):
        publish(modules, name, module)
        if modules is layer.oft_R:
            seen.append(module.weight.detach().clone())

    monkeypatch.setattr(torch.nn.ModuleDict, "__setitem__", observed)
    layer.update_layer("default", r=0, oft_block_size=8)
    assert len(seen) == 1
    assert torch.count_nonzero(seen[0]) == 0


def test_while_the_active_adapter_is_deleted_a_forward_has_an_adapter(monkeypatch):
    layer, x, seen = two_adapters(), torch.randn(3, 96), []
    layer.set_adapter("b")
    expected = layer(x).detach()
    layer.set_adapter("a")
    delete = torch.nn.ModuleDict.__delitem__

    def observed(modules, name):
        delete(modules, name)
        seen.append(layer(x).detach())

    monkeypatch.setattr(torch.nn.ModuleDict, "__delitem__", observed)
    with pytest.warns(UserWarning, match="Adapter a was active which is now deleted. Setting active adapter to b"):
        layer.delete_adapter("a")
    assert seen
    assert all(torch.equal(out, expected) for out in seen)
    assert layer.active_adapters == ["b"]


def test_discarding_the_pristine_weight_frees_it():
    layer = oft_layer().eval()
    layer(torch.randn(3, 96))
    pristine = weakref.ref(layer.base_layer.W_q.untyped_storage())
    layer.merge()
    layer(torch.randn(3, 96))
    gc.collect()
    assert pristine() is not None
    layer.drop_pristine()
    gc.collect()
    assert pristine() is None
