"""`OFTLinear` on dense layers: PEFT's outputs, gradients, parameters and merged weights."""

from __future__ import annotations

import copy
import itertools
import pickle

import oracle
import pytest
import torch
from helpers import TOLERANCE, live_bytes, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig
from peft.tuners.oft.layer import Linear as PeftLinear
from torch import nn

from hqq_oft import HqqOFTLinear, OFTLinear

N, K = 64, 96
BLOCKS = (2, 8, 32, K)
TERMS = (1, 2, 4, 5, None)
VARIANTS = ({}, {"block_share": True}, {"coft": True, "eps": 0.5}, {"block_share": True, "coft": True, "eps": 0.05})


def settings(block=8, terms=5, **variant):
    neumann = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    return OFTConfig(r=0, oft_block_size=block, **neumann, **variant)


def dense_layer(dtype=torch.float32, bias=True):
    return nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)


def both(base, config, std=0.1):
    """PEFT's layer and ours over one base layer with the same random rotations."""
    options = {"config": config, "r": config.r, "oft_block_size": config.oft_block_size}
    if "config" not in PeftLinear.__init__.__code__.co_varnames:  # PEFT 0.18
        names = ("coft", "eps", "block_share", "module_dropout", "use_cayley_neumann", "num_cayley_neumann_terms")
        options = {name: getattr(config, name) for name in (*names, "r", "oft_block_size", "init_weights")}
    theirs, ours = PeftLinear(base, "default", **options), OFTLinear(base, "default", config=config)
    weight = theirs.oft_R["default"].weight
    nn.init.normal_(weight, std=std)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def oft_linear(base=None, adapter="default", std=0.1, **options):
    layer = OFTLinear(dense_layer() if base is None else base, adapter, **{"r": 0, "oft_block_size": 8, **options})
    nn.init.normal_(layer.oft_R[adapter].weight, std=std)
    return layer


def add(layer, adapter, std=0.1, **options):
    layer.update_layer(adapter, **{"r": 0, "oft_block_size": 8, **options})
    nn.init.normal_(layer.oft_R[adapter].weight, std=std)


def rotation(layer, adapter="default"):
    module = layer.oft_R[adapter]
    terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
    return oracle.rotation(module.weight.detach(), module.block_size, K, terms, None)


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    v = layer.oft_R["default"].weight
    return y.detach(), x.grad, torch.zeros_like(v) if v.grad is None else v.grad, v.detach()


@pytest.mark.parametrize(("block", "terms", "variant"), list(itertools.product(BLOCKS, TERMS, VARIANTS)), ids=str)
def test_outputs_and_gradients_are_pefts(block, terms, variant):
    theirs, ours = both(dense_layer(), settings(block, terms, **variant), 0.3 / block**0.5)
    x, grad = torch.randn(2, 5, K), torch.randn(2, 5, N)
    if len(theirs.oft_R["default"].weight) == 1:
        # The gradient of a shared block is a sum over positions. Where they cancel, only rounding is left, so pull them
        # all the same way.
        pull = torch.ones(block, block).triu(1)
        grad = (x.unflatten(-1, (-1, block)) @ (pull - pull.T)).flatten(-2) @ theirs.base_layer.weight.T
    for out, expected in zip(run(ours, x, grad), run(theirs, x, grad), strict=True):
        assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    layer = oft_linear(dense_layer(dtype))
    assert layer.oft_R["default"].weight.dtype == dtype  # as in PEFT
    x = torch.randn(5, K, dtype=dtype)
    base = layer.base_layer
    truth = x.double() @ rotation(layer) @ base.weight.double().T + base.bias.double()
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), truth) <= TOLERANCE[dtype]


def test_autocast_gives_the_dtype_of_the_input():
    layer = oft_linear()
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert 0 < relative_error(y, layer(x)) <= TOLERANCE[torch.bfloat16]


def test_dropout_replaces_blocks_by_the_identity_in_training():
    layer = oft_linear(module_dropout=0.25, oft_block_size=8)
    nn.init.eye_(layer.base_layer.weight)
    nn.init.zeros_(layer.base_layer.bias)
    x = torch.randn(4, K)

    def rotated_blocks():
        return int((layer(x) != x[:, :N]).unflatten(-1, (-1, 8)).any(-1).any(0).sum())

    seen = {rotated_blocks() for _ in range(20)}  # of eight; three of twelve are dropped
    assert seen <= {5, 6, 7, 8}
    assert len(seen) > 1
    layer.eval()
    assert rotated_blocks() == 8


def test_only_x_and_v_are_saved():
    layer = oft_linear(dense_layer(bias=False))
    x = torch.randn(64, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x)
    kept = {t.data_ptr() for t in saved} - {layer.base_layer.weight.data_ptr()}
    assert kept == {x.data_ptr(), layer.oft_R["default"].weight.data_ptr()}


def test_rotations_are_kept_in_evaluation(cayleys):
    layer = oft_linear().eval()
    x = torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    assert len(cayleys) == 1
    layer.train()(x)
    assert len(cayleys) == 2


def test_active_and_disabled_adapters():
    layer = oft_linear(adapter="a").eval()
    add(layer, "b", oft_block_size=3)
    x = torch.randn(3, K)
    a, b = rotation(layer, "a"), rotation(layer, "b")
    weight, bias = layer.base_layer.weight.double().T, layer.base_layer.bias.double()
    for active, turns in (["a"], a), (["b"], b), (["b", "a"], b @ a):
        layer.set_adapter(active)
        assert relative_error(layer(x), x.double() @ turns @ weight + bias) <= 1e-5
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.delete_adapter("a")
    assert relative_error(layer(x), x.double() @ b @ weight + bias) <= 1e-5


@pytest.mark.parametrize("shape", [(4, K), (4, 3, K), (4, 2, 3, K)])
def test_each_sample_gets_its_own_adapter(shape):
    layer = oft_linear(adapter="a").eval()
    add(layer, "b")
    add(layer, "c", oft_block_size=3)
    names, x = ["c", "__base__", "a", "b"], torch.randn(shape)
    out = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        turned = x[row].double() @ rotation(layer, name) if name != "__base__" else x[row].double()
        truth = turned @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
        assert relative_error(out[row], truth) <= 1e-5
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 4"):
        layer(x, adapter_names=["a", "b"])
    layer.merge()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        layer(x, adapter_names=names)


# --- Merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("terms", [5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_weight_is_pefts_and_unmerging_restores_it(dtype, terms, safe):
    theirs, ours = both(dense_layer(dtype), settings(terms=terms))
    theirs.base_layer = copy.deepcopy(theirs.base_layer)
    base = ours.base_layer
    before, parameter = base.weight.clone(), base.weight
    x = torch.randn(5, K, dtype=dtype)
    unmerged = ours.eval()(x)
    theirs.merge(safe_merge=safe)
    ours.merge(safe_merge=safe)
    assert base.weight is parameter
    assert relative_error(base.weight, theirs.base_layer.weight) <= (1e-6 if dtype == torch.float32 else 6e-3)
    assert relative_error(base.weight, before.double() @ rotation(ours).T) <= TOLERANCE[dtype]
    assert torch.equal(ours(x), base(x))
    assert relative_error(ours(x), unmerged) <= 2 * TOLERANCE[dtype]
    ours.unmerge()
    assert torch.equal(base.weight, before)
    assert torch.equal(ours(x), unmerged)


def test_several_adapters_merge_in_the_order_of_the_forward():
    layer = oft_linear(adapter="a").eval()
    add(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    x, before = torch.randn(5, K), layer.base_layer.weight.clone()
    expected = layer(x)
    with pytest.warns(UserWarning, match=r"\['a'\] are not merged"):
        layer.merge(adapter_names=["b"])
    layer.merge()
    assert layer.merged_adapters == ["a", "b"]
    assert relative_error(layer(x), expected) <= 1e-5
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("where", ["device", "cpu", "none"])
def test_where_the_pristine_weight_is_kept(where):
    layer = oft_linear().eval()
    layer.keep_pristine = where
    size, before = live_bytes(), layer.base_layer.weight.clone()
    layer.merge()
    layer.clear_rotations()
    assert live_bytes() - size - before.nbytes == (0 if where == "none" else before.nbytes)
    if where == "none":
        with pytest.warns(UserWarning, match="loses precision"):
            layer.unmerge()
        assert 0 < relative_error(layer.base_layer.weight, before) <= 1e-5
    else:
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, before)


def test_a_merge_that_fails_changes_nothing():
    layer = oft_linear().eval()
    before = layer.base_layer.weight.clone()
    layer.oft_R["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in the merged weights: the adapter 'default'"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before)


def test_a_merged_layer_can_be_copied_cast_and_unmerged():
    layer = oft_linear().eval()
    before = layer.base_layer.weight.clone()
    layer.merge()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        twin.to(torch.float64)
        twin.unmerge()
        assert twin.base_layer.weight.dtype == torch.float64
        assert torch.equal(twin.base_layer.weight, before.double())


def test_disabling_adapters_unmerges():
    layer = oft_linear().eval()
    x = torch.randn(3, K)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged


def test_a_weight_cannot_be_loaded_into_a_merged_layer():
    layer = oft_linear()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(ValueError, match="Unmerge first"):
        layer.load_state_dict(state)


def test_layers_of_other_kinds_are_refused():
    with pytest.raises(TypeError, match="use HqqOFTLinear for HQQ layers"):
        OFTLinear(HQQLinear(None, None, compute_dtype=torch.float32, device="cpu"), "default", r=8)
    with pytest.raises(TypeError, match="got Conv2d"):
        OFTLinear(nn.Conv2d(8, 8, 3), "default", r=4)
    with pytest.raises(TypeError, match="use OFTLinear for other linear layers"):
        HqqOFTLinear(dense_layer(), "default", r=8)
    with pytest.raises(ValueError, match="give either `r`"):
        OFTLinear(dense_layer(), "default", r=8, oft_block_size=8)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_layer_computes_the_same():
    layer = oft_linear().eval()
    x = torch.randn(5, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), layer(x)) <= 1e-6
