import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from curvature_worker.stored_file import read_stored_file


def write(path, header, data=b"\x00" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_an_honest_file_is_read(path):
    save_file({"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.float64)}, path)
    file = read_stored_file(path)
    assert {t.name: (t.dtype, t.shape) for t in file.tensors} == {"w": ("F32", (2, 3)), "b": ("F64", (2,))}
    assert file.size_bytes == path.stat().st_size


def test_byte_ranges_are_those_of_the_numbers(path):
    values = torch.arange(6.0)
    save_file({"w": values}, path, metadata={"a": "b"})
    (found,) = read_stored_file(path).tensors
    assert path.read_bytes()[found.start : found.end] == values.numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ({"w": tensor(shape=[5])}, "bytes that its shape"),
        ({"w": tensor(dtype="F64")}, "bytes that its shape"),
        ({"w": tensor(dtype="F31")}, "dtype"),
        ({"w": tensor(dtype=["F32"])}, "dtype"),
        ({"w": tensor(shape=[-4])}, "shape"),
        ({"w": tensor(shape=[4.0])}, "shape"),
        ({"w": tensor(shape=[True, 4])}, "shape"),
        ({"w": tensor(shape=None)}, "shape"),
        ({"w": tensor(data_offsets=[0])}, "place"),
        ({"w": tensor(data_offsets=[16, 32])}, "does not begin"),
        ({"w": tensor(), "v": tensor()}, "does not begin"),
        ({"w": tensor(shape=[2], data_offsets=[0, 8])}, "end at"),
        ({"w": tensor(shape=[2**40], data_offsets=[0, 2**42])}, "end at"),
        ({"w": [1]}, "described"),
        ([], "object"),
        (b"{" * 10, "JSON|Expecting"),
        (b"[" * 200_000, "nested"),
    ],
)
def test_a_false_claim_is_found(path, header, part):
    with pytest.raises(ValueError, match=part):
        read_stored_file(write(path, header))


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, struct.pack("<Q", 2**60) + b"{}"], ids=["empty", "short", "long"])
def test_a_file_without_a_header_is_found(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        read_stored_file(path)


def test_a_link_is_not_followed(path, tmp_path):
    write(tmp_path / "other", {"w": tensor()})
    path.symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        read_stored_file(path)


def test_a_file_with_a_second_name_is_refused(path, tmp_path):
    write(path, {"w": tensor()})
    (tmp_path / "kept").hardlink_to(path)
    with pytest.raises(ValueError, match="of its own"):
        read_stored_file(path)


def test_a_pipe_keeps_nobody_waiting(path):
    os.mkfifo(path)
    with pytest.raises(ValueError, match="regular"):
        read_stored_file(path)
