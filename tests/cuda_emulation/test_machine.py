"""The emulated machine itself: conversions against PyTorch's."""

from __future__ import annotations

import ctypes

import pytest
import torch

from . import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_match_pytorch(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    library, is_bfloat16 = emulation.library(), int(dtype == torch.bfloat16)
    library.widen_all(ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(wide.data_ptr()), bits.numel(), is_bfloat16)
    expected = bits.view(dtype).float()
    assert torch.equal(wide.nan_to_num(7.0), expected.nan_to_num(7.0))
    values = torch.cat([torch.randn(2**16) * 10.0 ** torch.randint(-9, 9, (2**16,)), expected[expected.isfinite()]])
    halfway = values.to(dtype).float() * (1 + 2.0**-9)
    values = torch.cat([values, halfway, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.0, 65520.0])])
    narrow = torch.empty(values.numel(), dtype=torch.int16)
    library.narrow_all(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(narrow.data_ptr()), values.numel(), is_bfloat16
    )
    assert torch.equal(narrow.view(dtype), values.to(dtype))
