"""Data sets in all the forms a user may hold them, and their way to the server."""

import hashlib
import json
import tempfile
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.client.scripted_server import answering, reply
from torch.utils.data import DataLoader, TensorDataset

from curvature_client import Client, NotFoundError, PayloadTooLargeError, UnprocessableError
from curvature_client._batches import Batch
from curvature_client._datasets import DataSet, read_batch
from curvature_client._parallel import MOST_UNSENT
from curvature_protocol import Problem
from curvature_protocol.jobs import Job, JobStatus

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
PAIR, MAPPING = (X, Y), {"inputs": X, "targets": Y}


def pairs(count, samples=4):
    """Batches that all differ."""
    return [(torch.full((samples, 3), float(i)), torch.zeros(samples, dtype=torch.long)) for i in range(count)]


class Store:
    """What a server does with uploads and a submission; whatever a test wants otherwise, it overrides."""

    def __init__(self):
        self.batches, self.put, self.posted = {}, [], []

    def __call__(self, handler, body):
        if handler.path.startswith("/v1/jobs") or handler.path.startswith("/v1/plans"):
            return self.on_post(handler, json.loads(body))
        sha256 = handler.path.rpartition("/")[2]
        if handler.command == "HEAD":
            return reply(handler, 200 if sha256 in self.batches else 404)
        return self.on_put(handler, sha256, body)

    def on_put(self, handler, sha256, body):
        assert hashlib.sha256(body).hexdigest() == sha256
        self.put.append(sha256)
        self.batches[sha256] = body
        record = {"sha256": sha256, "kind": "batches", "size_bytes": len(body), "created_at": now()}
        reply(handler, 201, json.dumps(record).encode())

    def on_post(self, handler, body):
        self.posted.append(body)
        job = Job(id="j" * 32, status=JobStatus.QUEUED, created_at=now(), request={})
        reply(handler, 201, job.model_dump_json().encode())


def now():
    return datetime.now(UTC).isoformat()


def refuse(handler, status, code, param):
    problem = Problem(title=code, status=status, detail="no", code=code, param=param, remedy="do otherwise")
    reply(handler, status, problem.model_dump_json().encode())


@contextmanager
def serving(store, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"a model")
    with answering(store) as (url, _), Client(url, max_retries=0) as client:
        yield lambda batch, **options: client.submit(tmp_path / "model.pt", batch, ["grad"], **options)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("curvature-upload")]


# What is a data set


def test_iterables_of_batches_are_data_sets(tmp_path):
    safetensors.torch.save_file(MAPPING, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for given in (
        [PAIR, PAIR],
        [PAIR],
        [list(PAIR), list(PAIR)],
        (PAIR, PAIR, PAIR),
        [MAPPING, PAIR],
        (MAPPING, MAPPING),
        [path, str(path)],
        (pair for pair in [PAIR]),
        {"a": PAIR}.values(),
        tmp_path.glob("*.safetensors"),
        DataLoader(TensorDataset(X, Y), batch_size=3),
        [((X, X), Y), ((X, X), Y)],
        [(X.numpy(), Y.numpy()), PAIR],
    ):
        found = read_batch(given)
        assert isinstance(found, DataSet), given
        assert sum(batch.samples for batch in found.batches()) >= 4


@pytest.mark.parametrize(
    "given",
    [PAIR, [X, Y], ([X, X], Y), ((X, X), Y), [(X, X), Y], ({"x": X}, Y), MAPPING],
    ids=lambda g: type(g).__name__,
)
def test_a_pair_of_tensors_is_one_batch(given):
    assert isinstance(read_batch(given), Batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((X, Y), (X, Y)), "could be .inputs, targets. or two batches"),
        ([PAIR, PAIR, X], "item 2 is of type Tensor"),
        (X, "got Tensor"),
        (X.numpy(), "got ndarray"),
        ((X, Y, Y), "got 3 values"),
        ([], "no batches"),
        (iter([]), "no batches"),
        (3, "got int"),
        (TensorDataset(X, Y), "a TensorDataset gives samples, not batches; .* DataLoader"),
        ([(X[0], Y[0])] * 3, "part 0 of the data set: .* these have no axes"),
        ([PAIR, (X, Y[:0])], "part 1 of the data set: targets has shape"),
        (iter([PAIR, (X, None)]), "part 1 of the data set: targets must be .* got NoneType"),
        (iter([PAIR, {"x": X}]), "part 1 of the data set: a batch is .* a dictionary with 'x'"),
        ([PAIR, (X.double(), Y)], "part 1 of the data set holds inputs float64 .*; part 0 holds inputs float32"),
        ([PAIR, (X[None], Y)], r"holds inputs float32 \[1, 4, 3\]"),
        ([PAIR, ({"x": X}, Y)], r"holds inputs\.x float32"),
        ([PAIR, "absent.safetensors"], "part 1 of the data set: absent.safetensors does not exist"),
    ],
)
def test_anything_else_says_what_is_expected(given, message):
    def read():
        found = read_batch(given)
        return list(found.batches()) if isinstance(found, DataSet) else found

    with pytest.raises(UnprocessableError, match=message):
        read()


def test_there_is_an_end_to_the_number_of_parts(monkeypatch):
    monkeypatch.setattr("curvature_client._datasets.MOST_PARTS", 2)
    assert len(list(DataSet([PAIR] * 2).batches())) == 2
    with pytest.raises(UnprocessableError, match="at most 2 parts"):
        list(DataSet([PAIR] * 3).batches())


# Its way to the server


def test_parts_are_sent_once_in_their_order_and_not_where_the_server_has_them(tmp_path):
    store = Store()
    parts = [*pairs(3), pairs(3)[1], pairs(3, samples=2)[2]]
    with serving(store, tmp_path) as submit:
        job = submit(part for part in parts)
        assert job.id == "j" * 32
        named = store.posted[0]["batch"]["parts"]
        assert [part["samples"] for part in named] == [4, 4, 4, 4, 2]
        assert sorted(store.put) == sorted({part["sha256"] for part in named})
        assert len(store.put) == 4
        for part, (inputs, targets) in zip(named, parts, strict=True):
            stored = safetensors.torch.load(store.batches[part["sha256"]])
            assert torch.equal(stored["inputs"], inputs)
            assert torch.equal(stored["targets"], targets)
        submit([*parts, pairs(5)[4]])
        assert len(store.put) == 5


def test_files_of_parts_go_as_they_are_and_stay(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, (x, y) in zip(paths, pairs(2), strict=True):
        safetensors.torch.save_file({"inputs": x, "targets": y}, path)
    np.savez(tmp_path / "2.npz", inputs=np.full((4, 3), 7, np.float32), targets=np.zeros(4, np.int64))
    store = Store()
    with serving(store, tmp_path) as submit:
        submit([*paths, tmp_path / "2.npz"])
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert [part["sha256"] for part in store.posted[0]["batch"]["parts"]][:2] == expected
    assert len(store.put) == 3


def test_a_part_is_made_while_another_is_sent(tmp_path):
    arrived, made = threading.Event(), threading.Event()

    class Patient(Store):
        def on_put(self, handler, sha256, body):
            arrived.set()
            assert made.wait(20)
            super().on_put(handler, sha256, body)

    def batches():
        yield pairs(2)[0]
        assert arrived.wait(20)
        made.set()
        yield pairs(2)[1]

    store = Patient()
    with serving(store, tmp_path) as submit:
        submit(batches())
    assert len(store.put) == 2


def test_few_parts_are_held_at_a_time_and_their_files_go_when_they_are_sent(tmp_path, monkeypatch):
    monkeypatch.setattr("curvature_client._batches.IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ahead, held, made = [], [], []

    class Watching(Store):
        def on_put(self, handler, sha256, body):
            ahead.append(len(made) - len(self.put))
            super().on_put(handler, sha256, body)

    def batches():
        for pair in pairs(12):
            made.append(None)
            held.append(len(list(tmp_path.glob("curvature-*/*/batch.safetensors"))))
            yield pair

    store = Watching()
    with serving(store, tmp_path) as submit:
        submit(batches())
    assert len(store.put) == 12
    assert 0 < max(ahead) <= MOST_UNSENT + 1
    assert 0 < max(held) <= MOST_UNSENT
    assert not list(tmp_path.glob("curvature-*"))


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), StopAsyncIteration()])
def test_what_the_users_iterator_raises_comes_back_and_nothing_is_submitted(tmp_path, monkeypatch, error):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def batches():
        yield from pairs(3)
        raise error

    store = Store()
    with serving(store, tmp_path) as submit, pytest.raises(type(error)) as caught:
        submit(batches())
    assert caught.value is error
    assert store.posted == []
    assert not list(tmp_path.glob("curvature-*"))


def test_an_upload_in_progress_is_given_up(tmp_path):
    arrived, over = threading.Event(), threading.Event()

    class Stuck(Store):
        def __call__(self, handler, body):
            if handler.command == "HEAD":
                arrived.set()
                assert over.wait(20)
            super().__call__(handler, body)

    def batches():
        yield pairs(1)[0]
        assert arrived.wait(20)
        over.set()
        raise KeyboardInterrupt

    store = Stuck()
    with serving(store, tmp_path) as submit, pytest.raises(KeyboardInterrupt):
        submit(batches())
    assert store.posted == []


def test_a_part_that_is_refused_ends_the_upload(tmp_path):
    class Full(Store):
        def on_put(self, handler, sha256, body):
            self.put.append(sha256)
            refuse(handler, 413, "payload_too_large", None)

    store = Full()
    with serving(store, tmp_path) as submit, pytest.raises(PayloadTooLargeError):
        submit(pairs(50))
    assert len(store.put) <= MOST_UNSENT + 1
    assert store.posted == []


class Forgetful(Store):
    """Loses a part before the job holds it."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def on_post(self, handler, body):
        if self.times:
            self.times -= 1
            del self.batches[body["batch"]["parts"][1]["sha256"]]
            return refuse(handler, 404, "batch_not_found", "batch.parts.1")
        return super().on_post(handler, body)


@pytest.mark.parametrize("given", [pairs(3), DataLoader(TensorDataset(X, Y), batch_size=2)], ids=["list", "loader"])
def test_a_part_that_the_server_lost_is_sent_again(tmp_path, given):
    store = Forgetful(times=2)
    with serving(store, tmp_path) as submit:
        submit(given)
    assert len(store.put) == len(given) + 2
    assert len(store.posted) == 1


def test_what_an_iterator_gave_cannot_be_sent_again(tmp_path):
    store = Forgetful(times=1)
    with serving(store, tmp_path) as submit, pytest.raises(NotFoundError, match="can be read only once"):
        submit(iter(pairs(3)))
    store = Forgetful(times=99)
    with serving(store, tmp_path) as submit, pytest.raises(NotFoundError):
        submit(pairs(3))
    assert len(store.put) == 3 + 2


def test_a_plan_is_of_the_first_part(tmp_path):
    class Planning(Store):
        def on_post(self, handler, body):
            self.posted.append(body)
            refuse(handler, 422, "invalid_request", None)

    (tmp_path / "model.pt").write_bytes(b"a model")
    store = Planning()
    with answering(store) as (url, _), Client(url) as client:
        with pytest.raises(UnprocessableError):
            client.plan(tmp_path / "model.pt", DataLoader(TensorDataset(X, Y), batch_size=3), ["grad"])
        with pytest.raises(UnprocessableError, match="an iterator would lose it"):
            client.plan(tmp_path / "model.pt", iter(pairs(2)), ["grad"])
    assert [list(body["batch"]) for body in store.posted] == [["data"]]
    assert store.put == []


def test_where_it_may_run_and_whom_it_tells_go_with_the_request(tmp_path):
    store = Store()
    with serving(store, tmp_path) as submit:
        submit(PAIR)
        submit(PAIR, cache=False, requires={"gpu": True, "tag": "a100"}, webhook="https://example.org/done")
        submit(PAIR, webhook={"url": "https://example.org", "secret": "s" * 16})
        for options, message in (
            ({"requires": {"gpus": 1}}, "requires.gpus"),
            ({"requires": "gpu"}, "requires: "),
            ({"webhook": "ftp://x"}, "webhook.url"),
            ({"webhook": {"url": "https://example.org", "secret": "hush"}}, "webhook.secret"),
        ):
            with pytest.raises(UnprocessableError, match=message) as caught:
                submit(PAIR, **options)
            assert "hush" not in str(caught.value)
    names = ("cache", "requires", "webhook")
    plain = {"gpu": False, "tag": None, "memory_bytes": 0}
    assert [[body[name] for name in names] for body in store.posted] == [
        [True, plain, None],
        [False, {"gpu": True, "tag": "a100", "memory_bytes": 0}, {"url": "https://example.org/done", "secret": None}],
        [True, plain, {"url": "https://example.org", "secret": "s" * 16}],
    ]


def test_a_bar_tells_which_part_is_sent(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"a model")
    with answering(Store()) as (url, _), Client(url, progress=True) as client:
        client.submit(tmp_path / "model.pt", pairs(4), ["grad"])
        client.submit(tmp_path / "model.pt", (pair for pair in [*pairs(4), pairs(1, samples=2)[0]]), ["grad"])
    shown = capsys.readouterr().err
    assert "uploading part 4" in shown
    assert "4/4" in shown
    assert "uploading part 5" in shown


def test_folders_are_no_batches(tmp_path):
    with pytest.raises(UnprocessableError, match="is a folder"):
        list(read_batch([Path(tmp_path), Path(tmp_path)]).batches())
