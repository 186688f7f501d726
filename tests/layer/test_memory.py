"""What a forward saves for backward, at full size."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    hqq_layer,
)
from peft import OFTConfig
from torch import nn

from hqq_oft import HqqOFTLinear


def test_forward_saves_only_x_and_v_and_less_than_peft():
    """4096 tokens through a 4096x4096 bfloat16 layer, on meta tensors: this layer saves only x and v, PEFT more."""
    from peft.tuners.oft.layer import Linear as PeftLinear

    if "config" not in PeftLinear.__init__.__code__.co_varnames:
        pytest.skip("this PEFT's layer does not take HQQ layers")
    n = 4096
    base = hqq_layer(64, 64, group_size=64, dtype=torch.bfloat16, bias=False, optimize=False)
    base.W_q = nn.Parameter(torch.empty(n * n // 64 // 2, 64, dtype=torch.uint8, device="meta"), requires_grad=False)
    base.in_features = base.out_features = n
    base.device = "meta"
    groups = {name: torch.empty(n * n // 64, 1, dtype=torch.bfloat16, device="meta") for name in ("scale", "zero")}
    base.meta = {**base.meta, **groups, "shape": (n, n)}
    config = OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True)
    kept = {}
    for cls in (HqqOFTLinear, PeftLinear):
        layer = cls(base, "default", config=config, r=0).to("meta")
        x = torch.empty(n, n, dtype=torch.bfloat16, device="meta", requires_grad=True)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.__setitem__(id(t), t), t)[1], lambda t: t
        ):
            layer(x)
        kept[cls] = [t for t in saved.values() if t.shape != base.W_q.shape]
    v = layer.oft_R["default"].weight
    assert sorted((tuple(t.shape), t.dtype) for t in kept[HqqOFTLinear]) == sorted(
        [((n, n), torch.bfloat16), (tuple(v.shape), torch.float32)], key=str
    )
    size = {cls: sum(t.numel() * t.element_size() for t in tensors) for cls, tensors in kept.items()}
    assert size[HqqOFTLinear] < 1.01 * n * n * 2
    assert size[PeftLinear] > 2 * n * n * 2  # an fp32 copy of x
