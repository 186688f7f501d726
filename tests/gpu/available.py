"""Whether the tests of this folder can run here."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    if find_spec("triton") is None:
        return "needs Triton"
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels in this process: run `make gpu-test`, or set TRITON_INTERPRET=0"
    return None
