"""What `pip install` made: the library loads, all of it is bound, every operator has its kernels."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import native_build
import pytest
import torch

import hqq_oft
from hqq_oft import env
from hqq_oft.ops import native
from hqq_oft.ops.table import OPERATIONS

from .conftest import DEVICE_NAME


def test_the_package_under_test_is_the_installed_one():
    assert Path(hqq_oft.__file__).is_relative_to(sys.prefix)
    assert native.REASON == ""


def test_every_symbol_of_the_library_is_bound():
    ctypes.CDLL(str(native.LIBRARY), os.RTLD_NOW)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operator_has_a_kernel_for_the_device(name):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"hqq_oft::{name}", "CUDA")


@pytest.mark.skipif(native_build.load().cuda_missing() is not None, reason="nvcc cannot build the CUDA kernels here")
def test_the_cuda_kernels_are_built():
    assert native.cuda.has_kernels()
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("hqq_oft_native::decode", "CUDA")


def test_triton_serves_every_operation_on_the_device():
    assert {env.serving(name, torch.device("cuda", 0))[0] for name in OPERATIONS} == {"triton"}
    assert DEVICE_NAME in env.report()
