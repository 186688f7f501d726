"""Results equal to PEFT 0.21.2 and to the float64 oracle: every storage crossed with every kind of adapter.

PEFT's Linear and HqqOFTLinear wrap the same HQQ layer in float32 and hold the same parameters.
"""

from __future__ import annotations

import itertools
import warnings

import oracle
import peft
import pytest
import torch
from helpers import hqq_layer, relative_error
from peft import OFTConfig
from peft.tuners.oft import layer as peft_layer

from hqq_oft import HqqOFTLinear

pytestmark = pytest.mark.skipif(peft.__version__ != "0.21.2", reason="numerics are pinned to PEFT 0.21.2")

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
GROUPS = (8, 64, 128, None)
WHOLE = -1  # one block as wide as the layer
BLOCKS = (2, 3, 8, 32, 96, WHOLE)
TERMS = (1, 2, 3, 4, 5, 6, 7, 8, None)
VARIANTS = ({}, {"block_share": True}, {"coft": True, "eps": 0.5}, {"block_share": True, "coft": True, "eps": 0.05})
ADAPTERS = list(itertools.product(BLOCKS, TERMS, VARIANTS))
STORAGES = list(itertools.product(BITS, (0, 1), GROUPS, (False, True)))
assert len(ADAPTERS) == 216
assert len(STORAGES) == 128


def adapter_config(block, terms, variant):
    return OFTConfig(
        r=0,
        oft_block_size=block,
        use_cayley_neumann=terms is not None,
        num_cayley_neumann_terms=terms or 5,
        init_weights=True,
        **variant,
    )


def both(base, config, v):
    """PEFT's layer and ours over one HQQ layer, with the parameters `v`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no size may be adjusted
        layers = (peft_layer.Linear(base, "default", config=config, r=0), HqqOFTLinear(base, "default", config=config))
    for layer in layers:
        layer.oft_R["default"].weight.data.copy_(v)
    return layers


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(grad)
    v_grad = layer.oft_R["default"].weight.grad
    return out.detach(), x.grad, torch.zeros(1) if v_grad is None else v_grad


def assert_parity(base, adapter, truth=None):
    block, terms, variant = adapter
    N, K = base.out_features, base.in_features
    block = K if block == WHOLE else block
    stored = 1 if variant.get("block_share") else K // block
    v = torch.randn(stored, block * (block - 1) // 2) * (0.3 / block**0.5)
    x = torch.randn(5, K)
    grad = torch.randn(5, N)
    if stored == 1:
        # A shared block's gradient is a sum over positions. If they only cancel, what is left is rounding, in both
        # layers; so let all of them pull the same way.
        pull = torch.ones(block, block).triu(1)
        grad = ((x.reshape(5, -1, block) @ (pull - pull.T)).reshape(5, K) @ base.dequantize().T).detach()
    theirs, ours = both(base, adapter_config(block, terms, variant), v)
    expected, found = run(theirs, x, grad), run(ours, x, grad)
    stored_v = ours.oft_R["default"].weight  # projected by coft
    assert relative_error(stored_v, theirs.oft_R["default"].weight) <= 1e-5
    for name, out, reference in zip(("y", "dx", "dv"), found, expected, strict=True):
        assert relative_error(out, reference.reshape(out.shape) if terms != 1 else reference) <= 1e-5, (name, adapter)
    if truth is not None:
        weight, bias = truth
        max_norm = variant["eps"] / stored**0.5 if variant.get("coft") else None
        x64, v64 = x.double().requires_grad_(), v.double().requires_grad_()
        rotation = oracle.rotation(v64, block, K, terms, max_norm)
        y64 = x64 @ rotation @ weight.T + (0 if bias is None else bias.double())
        y64.backward(grad.double())
        assert relative_error(found[0], y64) <= 1e-5, adapter
        assert relative_error(found[1], x64.grad) <= 1e-5, adapter
        if max_norm is None and terms != 1:  # PEFT's gradient goes straight through the projection, the truth does not
            assert relative_error(found[2], v64.grad) <= 1e-5, adapter


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_every_adapter_against_peft_and_the_oracle(adapter):
    nbits, axis, group_size, bias = STORAGES[(ADAPTERS.index(adapter) * 7) % len(STORAGES)]
    base = hqq_layer(64, 384, nbits=nbits, axis=axis, group_size=group_size, bias=bias, optimize=False)
    # The oracle builds its rotations entry by entry, so large blocks are left to PEFT's numbers and a smaller case.
    truth = (oracle.of_layer(base), base.bias) if 0 < adapter[0] <= 32 else None
    assert_parity(base, adapter, truth)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_adapter_on_every_storage(storage):
    nbits, axis, group_size, bias = storage
    # narrower than in the other test, so that 128 levels straddle the rows, and for time
    base = hqq_layer(32, 192, nbits=nbits, axis=axis, group_size=group_size, bias=bias, optimize=False)
    for adapter in ADAPTERS:
        assert_parity(base, adapter)


def test_large_blocks_against_the_oracle():
    base = hqq_layer(8, 96, group_size=32)
    for terms in (5, None):
        v, x = torch.randn(1, 96 * 95 // 2) * 0.03, torch.randn(3, 96)
        config = OFTConfig(
            r=0, oft_block_size=96, use_cayley_neumann=terms is not None, num_cayley_neumann_terms=terms or 5
        )
        layer = HqqOFTLinear(base, "default", config=config)
        layer.oft_R["default"].weight.data.copy_(v)
        y = layer(x)
        truth = x.double() @ oracle.rotation(v, 96, 96, terms) @ oracle.of_layer(base).T + base.bias.double()
        assert relative_error(y, truth) <= 1e-5
