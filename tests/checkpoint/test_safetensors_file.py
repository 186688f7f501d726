"""Reading safetensors files that are damaged, truncated or hostile, and writing ones that others read."""

from __future__ import annotations

import json
import resource
import stat
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hqq_oft import CheckpointError
from hqq_oft.checkpoint.files import DTYPES, Checkpoint, crc32, write_checkpoint

NAME = "model.safetensors"


def tensors():
    everything = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    everything["scalar"] = torch.tensor(1.5)
    everything["empty"] = torch.empty(0, 4)
    everything["strided"] = torch.arange(12.0).reshape(3, 4).T
    everything["view"] = everything["strided"].T[1:]
    everything["same view"] = everything["strided"].T[1:]
    return everything


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and crc32(a) == crc32(b)


@pytest.mark.parametrize("size", [10**6, 50])
def test_written_files_are_read_here_and_by_safetensors_and_their_checksums_fit(tmp_path, size):
    expected = tensors()
    write_checkpoint(tmp_path, expected, size, "1.0")
    paths = list(tmp_path.glob("*.safetensors"))
    assert (len(paths) > 1) == (size == 50) == (tmp_path / "model.safetensors.index.json").exists()
    theirs = {}
    for path in paths:
        theirs |= safetensors.torch.load_file(path)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "hqq_oft.json").stat().st_mode)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.has_checksums
        assert set(checkpoint.names) == theirs.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(checkpoint.read(name), tensor.contiguous()), name
            assert same(theirs[name], tensor.contiguous()), name


def test_files_of_the_first_version_of_this_package_are_read(tmp_path):
    """Its own writer padded the header and put the tensors in the order of their names within one element size."""
    expected = {"b": torch.arange(3.0), "c": torch.arange(5, dtype=torch.uint8), "a": torch.ones(2, dtype=torch.int64)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, dtype in (("a", "I64"), ("b", "F32"), ("c", "U8")):
        raw = expected[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(expected[name].shape), "data_offsets": offsets}
        data += raw
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    sums = {name: crc32(tensor) for name, tensor in expected.items()}
    (tmp_path / "hqq_oft.json").write_text(json.dumps({"format_version": 1, "written_by": "hqq_oft", "crc32": sums}))
    with Checkpoint(tmp_path) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_existing_files_are_not_overwritten_and_complex_dtypes_are_refused(tmp_path):
    (tmp_path / NAME).write_text("mine")
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path, {"w": torch.zeros(1)}, 10**6, "1.0")
    assert (tmp_path / NAME).read_text() == "mine"
    with pytest.raises(TypeError, match=r"tensor 'z': torch.complex128 can't be stored; accepted are F64"):
        write_checkpoint(tmp_path, {"z": torch.zeros(1, dtype=torch.complex128)}, 10**6, "1.0")
    assert len(list(tmp_path.iterdir())) == 1


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HUGE = 2**60


def file_bytes(header, data=24, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(**changes):
    return file_bytes({"w": {**GOOD, **changes}})


HOSTILE = {
    "an empty file": (b"", "header too small"),
    "half a length": (b"\x01\x00", "header too small"),
    "a length alone": (struct.pack("<Q", 10), "invalid header length"),
    "a header longer than the file": (file_bytes({"w": GOOD}, length=10**6), "invalid header length"),
    "a header of exabytes": (file_bytes({"w": GOOD}, length=HUGE), "header too large"),
    "a pickle": (b"\x80\x04\x95" + bytes(64), "invalid header length"),
    "a header that is no JSON": (file_bytes(b"{'w': 1}"), "invalid JSON in header"),
    "a header that is no UTF-8": (file_bytes(b"\xff\xfe{}"), "invalid UTF-8 in header"),
    "a header nested without end": (file_bytes(b"[" * 100_000), "invalid JSON in header"),
    "a number of a million digits": (file_bytes(b"9" * 1_000_000), "invalid JSON in header"),
    "a header that is a list": (file_bytes([GOOD]), "invalid JSON in header"),
    "an entry that is no object": (file_bytes({"w": 3}), "invalid JSON in header"),
    "an entry without offsets": (file_bytes({"w": {"dtype": "F32", "shape": []}}), "missing field `data_offsets`"),
    "an unknown dtype": (entry(dtype="F12"), "unknown variant `F12`"),
    "a dtype that is no text": (entry(dtype=["F32"]), "invalid JSON in header"),
    "a negative size": (entry(shape=[-2, -3]), "invalid value: integer `-2`"),
    "a size that is a fraction": (entry(shape=[2.0, 3]), "invalid type: floating point `2.0`"),
    "a size that is no number": (entry(shape=[float("nan"), 3]), "invalid JSON in header"),
    "a size that is a truth": (entry(shape=[True, 6]), "invalid type: boolean `true`"),
    "a shape that is a number": (entry(shape=6), "invalid JSON in header"),
    "a shape of a thousand dimensions": (entry(shape=[1] * 1000), "invalid shape, data type, or offset"),
    "a shape of exabytes": (entry(shape=[HUGE, HUGE]), "overflow computing buffer size"),
    "a shape that overflows to the right size": (entry(shape=[2**62 + 1, 6]), "overflow computing buffer size"),
    "offsets past the end": (entry(data_offsets=[0, HUGE]), "invalid shape, data type, or offset"),
    "a shape and offsets past the end": (
        entry(shape=[2**40], data_offsets=[0, 2**42]),
        "incomplete metadata, file not fully covered",
    ),
    "offsets backwards": (entry(data_offsets=[24, 0]), "invalid offset for tensor `w`"),
    "negative offsets": (entry(data_offsets=[-24, 0]), "invalid value: integer `-24`"),
    "three offsets": (entry(data_offsets=[0, 12, 24]), "invalid JSON in header"),
    "too few bytes for the shape": (entry(data_offsets=[0, 20]), "invalid shape, data type, or offset"),
    "truncated data": (file_bytes({"w": GOOD}, data=23), "incomplete metadata, file not fully covered"),
    "data behind the last tensor": (file_bytes({"w": GOOD}, data=32), "incomplete metadata, file not fully covered"),
    "two tensors in one place": (file_bytes({"v": GOOD, "w": GOOD}), "invalid offset for tensor `[vw]`"),
    "a gap between tensors": (
        file_bytes({"v": GOOD, "w": {**GOOD, "data_offsets": [28, 52]}}, data=52),
        "invalid offset for tensor `w`",
    ),
}


@pytest.fixture
def _no_room():
    """Fail any allocation of more than 128 MiB, which a size claimed in a header would need."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("_no_room")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_file_is_refused_by_name_and_nothing_is_allocated(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint(tmp_path)
    assert str(raised.value).startswith(f"{path}: truncated, damaged or not a safetensors file (")


def test_a_dtype_that_torch_tensors_lack_here_is_refused_by_name(tmp_path):
    (tmp_path / NAME).write_bytes(file_bytes({"w": {"dtype": "U64", "shape": [3], "data_offsets": [0, 24]}}))
    with Checkpoint(tmp_path) as checkpoint:
        for call in (lambda: checkpoint.read("w"), lambda: checkpoint.expect("w", (3,), (torch.int64,))):
            with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'w': dtype U64 is not one of F64"):
                call()
        with pytest.raises(CheckpointError, match="tensor 'v': missing"):
            checkpoint.read("v")


def test_a_file_truncated_after_its_header_was_read_raises(tmp_path):
    path = tmp_path / NAME
    write_checkpoint(tmp_path, {"w": torch.zeros(100_000)}, 10**6, "1.0")
    with Checkpoint(tmp_path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            CheckpointError, match=r"model.safetensors: tensor 'w': truncated or damaged after the file"
        ):
            checkpoint.read("w")


def test_a_model_whose_file_is_overwritten_keeps_its_tensors(tmp_path):
    write_checkpoint(tmp_path, {"w": torch.zeros(100_000)}, 10**6, "1.0")
    with Checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint.read("w")
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(b"\xff" * len(content))
    assert not tensor.any()
