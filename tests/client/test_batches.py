"""Batches in all the forms a user may hold them, and the file they become."""

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from curvature_client._batches import Batch
from curvature_client._errors import UnprocessableError

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


def file_of(given, tmp_path):
    return safetensors.torch.load(Batch(given).payload(tmp_path).read())


def test_one_input_several_inputs_and_named_inputs(tmp_path):
    assert set(file_of((X, Y), tmp_path)) == {"inputs", "targets"}
    assert set(file_of({"inputs": (X, X), "targets": Y}, tmp_path)) == {"inputs.0", "inputs.1", "targets"}
    assert set(file_of({"inputs": {"a": X, "b": X}, "targets": Y}, tmp_path)) == {"inputs.a", "inputs.b", "targets"}
    assert set(file_of(([X, X], Y), tmp_path)) == {"inputs.0", "inputs.1", "targets"}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(4, 6)[:, ::2],
        torch.randn(1, 3).expand(4, 3),
        torch.randn(4, 3, requires_grad=True) * 2,
        torch.randn(4, 3).half(),
        torch.randn(4, 3).bfloat16(),
        torch.randn(4, 3, dtype=torch.complex64).conj().real,
    ],
    ids=["transposed", "strided", "expanded", "graph", "half", "bfloat16", "view of complex"],
)
def test_tensors_keep_their_numbers_and_types(tmp_path, tensor):
    saved = file_of((tensor, Y), tmp_path)["inputs"]
    assert saved.dtype == tensor.dtype
    assert torch.equal(saved, tensor)


def test_arrays_of_numpy_go_without_torch_and_in_this_machines_byte_order(tmp_path):
    array = np.arange(12.0).reshape(4, 3)
    for given in (array, array[:, ::-1], np.asfortranarray(array), array.astype(">f8"), array[::2].repeat(2, 0)):
        saved = safetensors.numpy.load(Batch((given, np.arange(4))).payload(tmp_path).read())
        assert np.array_equal(saved["inputs"], given)


def test_targets_may_be_the_inputs(tmp_path):
    saved = file_of((X, X), tmp_path)
    assert torch.equal(saved["inputs"], saved["targets"])


def test_equal_batches_have_equal_hashes(tmp_path):
    first, second = Batch((X, Y)).payload(tmp_path), Batch((X.clone(), Y.clone())).payload(tmp_path)
    assert first.sha256 == second.sha256
    assert first.sha256 != Batch((X + 1, Y)).payload(tmp_path).sha256


def test_a_large_batch_lies_in_a_file_while_it_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr("curvature_client._batches.IN_MEMORY_BYTES", 100)
    payload = Batch((torch.randn(100, 3), torch.zeros(100))).payload(tmp_path)
    assert payload.path is not None
    assert b"".join(payload.chunks()) == payload.path.read_bytes()
    assert payload.size_bytes == payload.path.stat().st_size


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ((X, Y, Y), "invalid_batch", "got 3 values"),
        (X, "invalid_batch", "got Tensor"),
        ({"x": X, "y": Y}, "invalid_batch", "a dictionary with 'x', 'y'"),
        ({}, "invalid_batch", "a dictionary with nothing"),
        (({}, Y), "invalid_batch", "no inputs"),
        (({"a b": X}, Y), "invalid_batch", "got 'a b'"),
        ((X, None), "invalid_targets", "got NoneType"),
        (("text", Y), "invalid_inputs", "got str"),
        ((X.to_sparse(), Y), "invalid_inputs", "layout torch.sparse_coo"),
        ((np.array(["a"]), Y), "invalid_inputs", "dtype <U1"),
        ((X[:0], Y[:0]), "empty_batch", "no samples"),
        ("absent.safetensors", "invalid_batch", "does not exist"),
    ],
)
def test_anything_else_says_what_is_expected(given, code, message):
    with pytest.raises(UnprocessableError, match=message) as caught:
        Batch(given)
    assert caught.value.code == code


def test_npz_files(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=X.numpy(), targets=Y.numpy())
    assert torch.equal(file_of(tmp_path / "a.npz", tmp_path)["inputs"], X)
    np.savez(tmp_path / "b.npz", images=X.numpy())
    with pytest.raises(UnprocessableError, match="it holds images"):
        Batch(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"nothing")
    with pytest.raises(UnprocessableError, match=r"no \.npz file"):
        Batch(tmp_path / "c.npz")
