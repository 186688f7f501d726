"""Reading safetensors files that are damaged, truncated or hostile, and writing ones that others read."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch

from hqq_oft import CheckpointError
from hqq_oft.checkpoint.safetensors_file import DTYPES, TensorFile, crc32, write


def tensors():
    everything = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    everything["scalar"] = torch.tensor(1.5)
    everything["empty"] = torch.empty(0, 4)
    everything["strided"] = torch.arange(12.0).reshape(3, 4).T
    return everything


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and crc32(a) == crc32(b)


def test_written_files_are_read_by_this_reader_and_by_the_reference_implementation(tmp_path):
    expected = tensors()
    sums = write(tmp_path / "a.safetensors", expected)
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.entries.keys() == theirs.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(file.read(name), tensor.contiguous()), name
            assert same(theirs[name], tensor.contiguous()), name
            assert sums[name] == crc32(tensor)


def test_files_of_the_reference_implementation_are_read(tmp_path):
    expected = {name: tensor.contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(expected, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert all(same(file.read(name), tensor) for name, tensor in expected.items())


def test_existing_files_are_not_overwritten_and_complex_dtypes_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.safetensors", {})
    with pytest.raises(TypeError, match=r"tensor 'z': safetensors does not support torch.complex64"):
        write(tmp_path / "b.safetensors", {"z": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "b.safetensors").exists()


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HUGE = 2**60


def file_bytes(header, data=24, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(**changes):
    return file_bytes({"w": {**GOOD, **changes}})


HOSTILE = {
    "an empty file": (b"", "truncated, or not a safetensors file.* in 0 bytes"),
    "half a length": (b"\x01\x00", "truncated, or not a safetensors file.* in 2 bytes"),
    "a length alone": (struct.pack("<Q", 10), "truncated, or not a safetensors file.* in 8 bytes"),
    "a header longer than the file": (file_bytes({"w": GOOD}, length=10**6), "truncated, or not a safetensors file"),
    "a header of exabytes": (file_bytes({"w": GOOD}, length=HUGE), "truncated, or not a safetensors file"),
    "a pickle": (b"\x80\x04\x95" + bytes(64), "truncated, or not a safetensors file"),
    "a header that is no JSON": (file_bytes(b"{'w': 1}"), "the header is not valid JSON"),
    "a header that is no UTF-8": (file_bytes(b"\xff\xfe{}"), "the header is not valid JSON"),
    "a header nested without end": (file_bytes(b"[" * 100_000), "the header is not valid JSON"),
    "a number of a million digits": (file_bytes(b"9" * 1_000_000), "the header is not"),
    "a header that is a list": (file_bytes([GOOD]), "the header is not a JSON object"),
    "a name twice": (
        file_bytes(b'{"w": ' + json.dumps(GOOD).encode() + b', "w": ' + json.dumps(GOOD).encode() + b"}"),
        "duplicate key",
    ),
    "an entry that is no object": (file_bytes({"w": 3}), "tensor 'w': its header entry lacks dtype"),
    "an entry without offsets": (
        file_bytes({"w": {"dtype": "F32", "shape": []}}),
        "tensor 'w': its header entry lacks",
    ),
    "an unknown dtype": (entry(dtype="F12"), "tensor 'w': dtype 'F12' is not one of F64"),
    "a dtype that is no text": (entry(dtype=["F32"]), r"tensor 'w': dtype \['F32'\] is not one of"),
    "a negative size": (entry(shape=[-2, -3]), r"tensor 'w': shape \[-2, -3\] is not a list of at most 16 sizes"),
    "a size that is a fraction": (entry(shape=[2.0, 3]), r"tensor 'w': shape \[2.0, 3\] is not a list"),
    "a size that is a truth": (entry(shape=[True, 6]), r"tensor 'w': shape \[True, 6\] is not a list"),
    "a shape that is a number": (entry(shape=6), "tensor 'w': shape 6 is not a list"),
    "a shape of a thousand dimensions": (entry(shape=[1] * 1000), "tensor 'w': shape .* is not a list of at most 16"),
    "a shape of exabytes": (
        entry(shape=[HUGE, HUGE]),
        "tensor 'w': 24 bytes are stored, but F32 .* requires 5316911983139",
    ),
    "a shape that overflows to the right size": (entry(shape=[2**62 + 1, 6]), "tensor 'w': 24 bytes are stored, but"),
    "offsets past the end": (
        entry(data_offsets=[0, HUGE]),
        "tensor 'w': data_offsets .* are outside the 24 bytes of data",
    ),
    "offsets backwards": (entry(data_offsets=[24, 0]), "tensor 'w': data_offsets .* are outside the 24 bytes"),
    "negative offsets": (entry(data_offsets=[-24, 0]), "tensor 'w': data_offsets .* are outside the 24 bytes"),
    "three offsets": (entry(data_offsets=[0, 12, 24]), "tensor 'w': data_offsets .* are outside the 24 bytes"),
    "too few bytes for the shape": (
        entry(data_offsets=[0, 20]),
        r"tensor 'w': 20 bytes are stored, but F32 \[2, 3\] requires 24",
    ),
    "truncated data": (
        file_bytes({"w": GOOD}, data=23),
        "tensor 'w': data_offsets .* outside the 23 bytes of data: truncated",
    ),
    "data behind the last tensor": (file_bytes({"w": GOOD}, data=32), "the header covers 24 of 32 bytes of data"),
    "two tensors in one place": (
        file_bytes({"v": GOOD, "w": GOOD}),
        "tensor 'w': it begins at byte 0, expected 24",
    ),
    "a gap between tensors": (
        file_bytes({"v": GOOD, "w": {**GOOD, "data_offsets": [28, 52]}}, data=52),
        "tensor 'w': it begins at byte 28, expected 24",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_file_is_refused_by_name_and_nothing_is_allocated(tmp_path, monkeypatch, case):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    monkeypatch.setattr(torch, "empty", None)  # the only way to memory for a tensor
    with pytest.raises(CheckpointError, match=message) as raised:
        TensorFile(path)
    assert str(path) in str(raised.value)


def test_a_file_truncated_after_its_header_was_read_raises(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.zeros(100_000)})  # more than a read-ahead takes in
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="tensor 'w': the file ends before the end of the tensor"):
            file.read("w")
