"""Tensors that shards keep: put together as one batch would have them, read and written piece by piece."""

import struct
import threading

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from tests.client.scripted_server import answering, reply

from curvature_client import Client
from curvature_client._remote import LazyArray, read_index, stored_bytes
from curvature_client._results import stored_result
from curvature_client._shards import PartedTensor
from curvature_client._tensors import LazyTensor
from curvature_protocol.results import Manifest, Provenance, ResultGroup, Source, StoredPart, TensorEntry

SIZES = (4, 1, 3)
PROVENANCE = Provenance(method="closed form", reduction="mean", Z=8, dtype="float32", device="cpu", engine_version="1",
                        verified=True)  # fmt: skip
NAMES = {"float64": "F64", "float32": "F32"}


class Folder:
    """Files in memory that count what is read."""

    def __init__(self):
        self.files, self.read_bytes, self.largest = {}, 0, 0
        self._lock = threading.Lock()

    def open(self, part):
        return _File(self, self.files[part.job_id, part.label])


class _File:
    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def read(self, start, end):
        with self.folder._lock:
            self.folder.read_bytes += end - start
            self.folder.largest = max(self.folder.largest, end - start)
        return bytearray(self.data[start:end])

    def stream(self, start, end, sink):
        for first in range(start, end, 13):
            sink(self.data[first : min(first + 13, end)])


def sharded(whole, axis, multiplier, sizes=SIZES):
    """The tensor `whole` / multiplier in shards along an axis: (entry, what they store put together, folder)."""
    folder, parts, stored, start = Folder(), [], [], 0
    for index, size in enumerate(sizes):
        piece = np.ascontiguousarray(np.take(whole, range(start, start + size), axis))
        job_id = str(index) * 32
        folder.files[job_id, "q"] = b"header!!" + piece.tobytes()
        end = 8 + piece.nbytes
        parts.append(StoredPart(job_id=job_id, attempt=1, label="q", shape=piece.shape, byte_start=8, byte_end=end))
        stored.append(piece)
        start += size
    entry = TensorEntry(
        name="p", parameter="p", dtype=NAMES[whole.dtype.name], shape=whole.shape, byte_start=0, byte_end=0,
        provenance=PROVENANCE, parts=tuple(parts), axis=axis, multiplier=multiplier,
    )  # fmt: skip
    return entry, folder


def case(axis, dtype, multiplier):
    shape = (8, 2, 5) if axis == 0 else (6, 8, 5)
    whole = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    entry, folder = sharded(whole, axis, multiplier)
    expected = (whole.astype(np.longdouble) * np.longdouble(multiplier)).astype(dtype)
    return PartedTensor(entry, folder.open), expected, folder


CASES = [(axis, dtype, m) for axis in (0, 1) for dtype in ("float32", "float64") for m in (1.0, 1 / 3, 1 / 1797**0.5)]


@pytest.mark.parametrize(("axis", "dtype", "multiplier"), CASES)
def test_parts_come_to_one_tensor_rounded_once(axis, dtype, multiplier):
    tensor, expected, _ = case(axis, dtype, multiplier)
    assert np.array_equal(tensor.read(), expected)
    assert stored_bytes(tensor.entry) == expected.nbytes
    lazy = LazyTensor(tensor)
    assert (tuple(lazy.shape), lazy.nbytes, lazy.dtype) == (expected.shape, expected.nbytes, getattr(torch, dtype))
    assert torch.equal(lazy + 0, torch.from_numpy(expected))
    assert np.array_equal(np.asarray(LazyArray(tensor)), expected)
    assert LazyArray(tensor).nbytes == expected.nbytes


INDICES = [
    *(0, 3, 4, -1, slice(3, 6), slice(4, 5), slice(0, 8, 3), slice(5, 2)),
    *((slice(2, 8), 1), (5, ..., slice(1, 3))),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_read_from_the_parts_that_hold_them_alone(index, axis):
    if axis == 1 and index in (slice(0, 8, 3), (slice(2, 8), 1)):
        index = slice(0, 6, 3)
    tensor, expected, folder = case(axis, "float32", 0.3)
    assert np.array_equal(read_index(tensor, index), expected[index])
    first = index[0] if isinstance(index, tuple) else index
    wanted = expected[first : first + 1 or None] if isinstance(first, int) else expected[first.start : first.stop]
    assert folder.read_bytes == wanted.nbytes


@pytest.mark.parametrize("block", [10**9, 100, 10], ids=["at once", "in blocks", "row by row"])
@pytest.mark.parametrize(("axis", "dtype", "multiplier"), CASES)
def test_a_stream_holds_a_block_at_a_time(monkeypatch, axis, dtype, multiplier, block):
    monkeypatch.setattr("curvature_client._shards.BLOCK_BYTES", block)
    tensor, expected, folder = case(axis, dtype, multiplier)
    pieces = []
    tensor.stream(pieces.append)
    assert b"".join(pieces) == expected.tobytes()
    row_bytes = expected[0].nbytes
    assert max(map(len, pieces)) <= max(block, 16)
    assert folder.largest <= max(block, 0) or row_bytes > block


def test_empty_parameters_and_many_parts():
    entry, folder = sharded(np.zeros((8, 0, 3), np.float32), 0, 0.5)
    assert PartedTensor(entry, folder.open).read().shape == (8, 0, 3)
    PartedTensor(entry, folder.open).stream(lambda data: None)
    whole = np.arange(500, dtype=np.float64).reshape(500, 1)
    entry, folder = sharded(whole, 0, 2.0, sizes=[1] * 500)
    tensor = PartedTensor(entry, folder.open)
    assert np.array_equal(tensor.read(), 2 * whole)
    folder.read_bytes = 0
    assert np.array_equal(tensor.read_rows(123, 125), 2 * whole[123:125])
    assert folder.read_bytes == 16


# A result whose tensors lie here and there


def group(label, tensors, **fields):
    return ResultGroup(
        label=label, extension=label, kind="parameters", convention="", file_bytes=fields.pop("file_bytes", 0),
        tensors=tensors, **fields,
    )  # fmt: skip


def test_a_result_reads_and_saves_from_its_own_file_shards_and_the_cache(tmp_path):
    own = {"p": np.arange(6, dtype=np.float32), "other": np.arange(3, dtype=np.float64)}
    data = safetensors.numpy.save(own)
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    offset = {"other": begin, "p": begin + 24}  # the widest first
    whole = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)
    shards, folder = sharded(whole, 0, 0.125)
    cached = PROVENANCE.model_copy(update={"cached_from": "c" * 32})

    def entry(name, parameter, array, provenance=PROVENANCE):
        end = offset[name] + array.nbytes
        return TensorEntry(name=name, parameter=parameter, dtype=NAMES[array.dtype.name], shape=array.shape,
                           byte_start=offset[name], byte_end=end, provenance=provenance)  # fmt: skip

    scalar = group("norm", (entry("other", None, own["other"], cached),), file_bytes=len(data),
                   source=Source(job_id="c" * 32, attempt=2, label="elsewhere"))  # fmt: skip
    manifest = Manifest(
        job_id="j" * 32, attempt=1, created_at="2026-11-26T00:00:00Z", engine_version="1", loss=1.0, loss_name="mse",
        reduction="mean", Z=8, seed=0, dtype="float32", device="cpu", isolation="none", samples=8, parts=3,
        groups=(
            group("grad", (entry("p", "p", own["p"]),), file_bytes=len(data)),
            group("rows", (shards.model_copy(update={"parts": shards.parts}),)),
            scalar.model_copy(update={"kind": "tensor"}),
        ),
    )  # fmt: skip
    asked = []

    def answer(handler, body):
        job_id, label = handler.path.split("/")[3], handler.path.rpartition("/")[2].removesuffix(".safetensors")
        content = data if job_id == "j" * 32 else folder.files[job_id, label]
        first, last = (int(n) for n in handler.headers["Range"].removeprefix("bytes=").split("-"))
        asked.append((job_id[0], label))
        reply(handler, 206, content[first : last + 1])

    with answering(answer) as (url, _), Client(url) as client:
        result = stored_result(client._transport, manifest)
        assert result.nbytes == 6 * 4 + 3 * 8 + whole.nbytes
        assert result.from_cache == {"norm": "c" * 32}
        assert repr(result).endswith("from the cache: norm>")
        assert asked == []
        assert torch.equal(result["rows"]["p"][3:5], torch.from_numpy(whole[3:5] * np.float32(0.125)))
        assert sorted(asked) == [("0", "q"), ("1", "q")]
        assert torch.equal(result["norm"] * 1, torch.from_numpy(own["other"]))
        path = result.save(tmp_path / "all.safetensors")
        assert result.fetch_all() is result
    saved = safetensors.torch.load_file(path)
    assert torch.equal(result["rows"]["p"].clone(), saved["rows/p"])
    assert torch.equal(saved["rows/p"], torch.from_numpy(whole * np.float32(0.125)))
    assert torch.equal(saved["grad/p"], torch.from_numpy(own["p"]))
    assert torch.equal(saved["norm"], torch.from_numpy(own["other"]))
