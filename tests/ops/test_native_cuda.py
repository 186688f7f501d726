"""What the native CUDA decode kernel refuses, and why, without a device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from gpu.cases import operations

from hqq_oft import Unsupported
from hqq_oft.ops import device_tables
from hqq_oft.ops.native import cuda


def call(m=4, n=64, k=128, b=32, dtype=torch.bfloat16, **settings):
    """The input, weight and rotations of a call of `linear`, which decide whether it is served."""
    x, weight, d, _, _ = operations(m, n, k, b, "cpu", dtype, **settings)["linear"]
    return x, weight, d


@pytest.mark.parametrize(
    "settings",
    [{}, {"m": 0}, {"m": 16}, {"bits": 3, "n": 70, "m": 8}, {"bits": 1}, {"group": 32}, {"group": 128}, {"b": 128}],
    ids=str,
)
def test_supported_settings_are_accepted(settings):
    x, weight, d = call(**settings)
    cuda.check_call(x, weight, d)
    cuda.check_call(x, weight, None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"m": 17}, "up to 16 tokens"),
        ({"bits": 3, "n": 70, "m": 9}, "up to 8 tokens at 3 bits"),
        ({"dtype": torch.float32}, "x is torch.float32"),
        ({"axis": 0}, "axis=1"),
        ({"bits": 3}, "64 outputs are not a multiple of 10"),
        ({"bits": 2, "n": 66, "group": 32, "k": 64}, "66 outputs are not a multiple of 4"),
        ({"group": 16}, "group_size is 16"),
        ({"group": 256, "k": 128}, "group_size is 256"),
        ({"b": 8}, "block size that is a multiple of 16, got 8"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused_with_the_reason(settings, reason):
    with pytest.raises(Unsupported, match=reason):
        cuda.check_call(*call(**settings))


@pytest.mark.parametrize("name", ["D", "scale", "zero"])
def test_other_dtypes_are_refused(name):
    x, weight, d = call()
    if name == "D":
        d = d.float()
    else:
        weight = replace(weight, **{name: getattr(weight, name).float()})
    with pytest.raises(Unsupported, match=f"{name} torch.float32"):
        cuda.check_call(x, weight, d)


def test_packed_weights_that_cannot_be_copied_by_sixteen_bytes_are_refused():
    x, weight, d = call()
    packed = torch.cat([weight.packed.flatten(), weight.packed.new_zeros(1)])[1:].view_as(weight.packed)
    with pytest.raises(Unsupported, match="aligned to 16 bytes"):
        cuda.check_call(x, replace(weight, packed=packed), d)


def test_other_devices_are_refused():
    with pytest.raises(Unsupported, match="the tensor is on cpu"):
        cuda.check_device(torch.zeros(1, 1), 4, by_name=True)


@pytest.fixture
def _device(monkeypatch, tmp_path):
    """A device with a table that says: 4 bits to 8 tokens."""
    (tmp_path / "some_gpu.json").write_text(json.dumps({"native_decode": {"4": 8}}))
    monkeypatch.setattr(device_tables.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(cuda, "_device", lambda _: ("some_gpu", (8, 0)))
    monkeypatch.setattr(cuda, "has_kernels", lambda: True)
    cuda.measured_tokens.cache_clear()
    yield
    cuda.measured_tokens.cache_clear()


class OnCuda:
    """The attributes of a tensor that `check_device` reads."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tokens):
        self.shape = (tokens, 128)


@pytest.mark.usefixtures("_device")
def test_auto_uses_the_kernel_only_where_a_measurement_exists():
    cuda.check_device(OnCuda(8), 4, by_name=False)
    for tokens, bits in ((9, 4), (1, 2)):
        with pytest.raises(Unsupported, match=f"not measured .* {bits} bits and {tokens} tokens"):
            cuda.check_device(OnCuda(tokens), bits, by_name=False)
        cuda.check_device(OnCuda(tokens), bits, by_name=True)


@pytest.mark.usefixtures("_device")
def test_devices_without_a_table_have_no_measurement(monkeypatch):
    monkeypatch.setattr(cuda, "_device", lambda _: ("other_gpu", (9, 0)))
    with pytest.raises(Unsupported, match="was not measured"):
        cuda.check_device(OnCuda(1), 4, by_name=False)


@pytest.mark.usefixtures("_device")
def test_old_devices_and_builds_without_cuda_are_refused(monkeypatch):
    monkeypatch.setattr(cuda, "_device", lambda _: ("some_gpu", (7, 5)))
    with pytest.raises(Unsupported, match=r"capability 8\.0"):
        cuda.check_device(OnCuda(1), 4, by_name=True)
    monkeypatch.setattr(cuda, "has_kernels", lambda: False)
    with pytest.raises(Unsupported, match="has no CUDA kernels"):
        cuda.check_device(OnCuda(1), 4, by_name=True)


def test_the_kernel_runs_on_the_callers_stream(monkeypatch):
    passed = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 1234, raising=False)
    monkeypatch.setattr(torch.ops.hqq_oft_native, "decode", lambda *args: passed.append(args), raising=False)
    x, weight, d = call()
    cuda.linear(x, weight, d, None, None)
    assert [args[-1] for args in passed] == [1234]
