"""Stored tensors as NumPy sees them, and indices that need only some rows."""

import numpy as np
import pytest

from curvature_client._errors import CurvatureError
from curvature_client._remote import LazyArray, RemoteTensor, read_index
from curvature_protocol.results import Provenance, TensorEntry

ARRAY = np.arange(120, dtype=np.float32).reshape(6, 4, 5)
PROVENANCE = Provenance(method="closed form", reduction="mean", Z=1, dtype="float32", device="cpu", engine_version="1",
                        verified=True)  # fmt: skip


class Source:
    """A file in memory that counts what is read."""

    def __init__(self, data):
        self.data, self.read_bytes = data, 0

    def read(self, start, end):
        self.read_bytes += end - start
        return bytearray(self.data[start:end])

    def stream(self, start, end, sink):
        sink(self.data[start:end])


def stored(array=ARRAY, dtype="F32"):
    data = b"header!!" + array.tobytes()
    entry = TensorEntry(
        name="p", parameter="p", dtype=dtype, shape=array.shape, byte_start=8, byte_end=len(data), provenance=PROVENANCE
    )
    source = Source(data)
    return RemoteTensor(entry, source), source


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), 2),
        (slice(None, None, 2), 6),
        (slice(-2, None), 2),
        (slice(4, 2), 0),
        (slice(2, 99), 4),
        (3, 1),
        (-1, 1),
        (np.int64(2), 1),
        ((slice(1, 3), 2), 2),
        ((slice(1, 5, 3), slice(0, 2), -1), 4),
        ((0, 1, 2), 1),
        ((5, ...), 1),
        ((slice(0, 1), ..., slice(1, 4)), 1),
    ],
    ids=str,
)
def test_only_the_rows_of_an_index_are_read(index, rows):
    remote, source = stored()
    assert np.array_equal(read_index(remote, index), ARRAY[index])
    assert source.read_bytes == rows * 80


@pytest.mark.parametrize("index", [..., None, slice(None, None, -1), [1, 2], ARRAY[:, 0, 0] > 5, (slice(None), [0])])
def test_other_indices_read_the_whole(index):
    remote, source = stored()
    assert read_index(remote, index) is None
    assert source.read_bytes == 0


def test_a_row_beyond_the_end():
    with pytest.raises(IndexError, match="index 6 is out of bounds for axis 0 with size 6"):
        read_index(stored()[0], 6)


def test_an_array_reads_itself_once_and_only_when_looked_at():
    remote, source = stored()
    lazy = LazyArray(remote)
    assert (lazy.shape, lazy.ndim, lazy.size, lazy.nbytes, len(lazy)) == ((6, 4, 5), 3, 120, 480, 6)
    assert lazy.dtype == np.float32
    assert source.read_bytes == 0
    assert np.array_equal(lazy[2:4], ARRAY[2:4])
    assert source.read_bytes == 160
    assert np.array_equal(np.asarray(lazy), ARRAY)
    assert np.array_equal(lazy + 1, ARRAY + 1)
    assert np.array_equal(np.sqrt(lazy), np.sqrt(ARRAY))
    assert lazy.mean() == ARRAY.mean()
    assert repr(lazy) == repr(ARRAY)
    assert source.read_bytes == 160 + 480


def test_empty_and_scalar_tensors():
    assert LazyArray(stored(ARRAY[:0])[0]).fetch().shape == (0, 4, 5)
    assert float(LazyArray(stored(np.array(3.0, np.float32))[0])) == 3.0


def test_a_type_of_the_future_says_what_to_do():
    with pytest.raises(CurvatureError, match="update the package"):
        stored(dtype="F8_E4M3")[0].read()
