"""The object store: a folder, memory and S3, through one interface."""

import asyncio
import os
import time
from datetime import timedelta

import obstore
import pytest

from curvature_state import ObjectStore
from curvature_state.objects import PART_BYTES, SENT_BYTES


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.integration)])
def objects(request, tmp_path):
    if request.param == "s3":
        return ObjectStore(request.getfixturevalue("s3_server").url())
    return ObjectStore((tmp_path / "my objects").as_uri() if request.param == "folder" else "memory:///")


@pytest.fixture
def s3(s3_server):
    """A store on S3, and its server."""
    return ObjectStore(s3_server.url()), s3_server


@pytest.fixture
def folder(tmp_path):
    return ObjectStore((tmp_path / "objects").as_uri()), tmp_path / "objects"


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_bytes_read_back(objects):
    objects.put_bytes("a/b", b"hello")
    assert objects.get_bytes("a/b") == b"hello"
    assert objects.head("a/b") == 5


def test_what_is_not_there(objects):
    assert objects.head("a") is None
    objects.delete("a")
    with pytest.raises(FileNotFoundError):
        objects.get_bytes("a")
    with pytest.raises(FileNotFoundError):
        list(objects.stream("a"))


def test_a_stream_of_many_parts_reads_back(objects):
    data = os.urandom(2 * PART_BYTES + 17)
    chunks = (data[at : at + 2**20] for at in range(0, len(data), 2**20))
    assert objects.put_stream("big", chunks) == len(data)
    assert b"".join(objects.stream("big")) == data
    assert b"".join(objects.stream("big", PART_BYTES - 3, PART_BYTES + 3)) == data[PART_BYTES - 3 : PART_BYTES + 3]


def test_an_asynchronous_stream_reads_back_whole_or_in_part(objects):
    data = os.urandom(2 * PART_BYTES + 17)

    async def chunks():
        for at in range(0, len(data), 2**20):
            yield data[at : at + 2**20]

    async def write_and_read(start, end):
        await objects.put_async_stream("big", chunks())
        return b"".join([bytes(part) async for part in objects.async_stream("big", start, end)])

    assert asyncio.run(write_and_read(0, len(data))) == data
    assert asyncio.run(write_and_read(PART_BYTES - 3, PART_BYTES + 3)) == data[PART_BYTES - 3 : PART_BYTES + 3]
    assert asyncio.run(write_and_read(5, 5)) == b""


def test_a_stream_goes_out_in_small_parts(folder):
    """What is sent to clients is copied several times on its way; small parts keep the server's memory flat."""
    objects, _ = folder
    objects.put_bytes("big", bytes(10 * SENT_BYTES))

    async def sizes():
        return [len(part) async for part in objects.async_stream("big", 0, 10 * SENT_BYTES)]

    assert max(asyncio.run(sizes())) <= 2 * SENT_BYTES


def test_an_empty_stream_stores_an_empty_object(objects):
    assert objects.put_stream("empty", iter(())) == 0
    assert objects.get_bytes("empty") == b""
    assert list(objects.stream("empty")) == []


async def nothing():
    for chunk in ():
        yield chunk


def test_an_empty_asynchronous_stream_stores_an_empty_object(objects):
    assert asyncio.run(objects.put_async_stream("empty", nothing())) == 0
    assert objects.head("empty") == 0


BROKEN_AFTER = pytest.mark.parametrize("size", [0, 1000, PART_BYTES + 1, 3 * PART_BYTES])


@BROKEN_AFTER
def test_a_source_that_breaks_stores_nothing(objects, size):
    def breaking():
        yield bytes(size)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        objects.put_stream("x", breaking())
    assert objects.head("x") is None


@BROKEN_AFTER
def test_an_asynchronous_source_that_breaks_stores_nothing(objects, size):
    async def breaking():
        yield bytes(size)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(objects.put_async_stream("x", breaking()))
    assert objects.head("x") is None


def test_a_source_that_breaks_leaves_no_parts_either(folder, s3):
    def breaking():
        yield bytes(3 * PART_BYTES)
        raise OSError("gone")

    for objects in (folder[0], s3[0]):
        with pytest.raises(OSError, match="gone"):
            objects.put_stream("x", breaking())
    assert files(folder[1]) == []
    assert s3[1].unfinished() == []


def test_moving_gives_the_final_key(objects):
    objects.put_bytes("uploads/1", b"x")
    objects.move("uploads/1", "models/2")
    assert objects.get_bytes("models/2") == b"x"
    assert objects.head("uploads/1") is None


def test_a_file_is_stored(objects, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    assert objects.put_file("results/1/x", source) == 5
    assert objects.get_bytes("results/1/x") == b"12345"


def test_an_object_is_copied_to_a_file(objects, tmp_path):
    objects.put_bytes("a", b"12345")
    objects.get_to_file("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"12345"


def test_a_folder_shows_where_its_objects_lie(folder):
    objects, path = folder
    assert objects.local_path("models/a") == path / "models/a"
    assert ObjectStore("memory:///").local_path("models/a") is None


def test_only_old_objects_are_removed(folder):
    objects, path = folder
    for name in ("old", "new"):
        objects.put_bytes(f"uploads/{name}", b"x")
    (path / "uploads/killed#1").write_bytes(b"part of an upload whose process was killed")
    objects.put_bytes("models/old", b"x")
    for name in ("uploads/old", "uploads/killed#1", "models/old"):
        os.utime(path / name, (1000, 1000))
    objects.delete_older("uploads", before=2000)
    assert files(path) == ["models/old", "uploads/new"]


def test_what_is_to_be_kept_is_kept_with_all_that_lies_below_it(folder):
    objects, path = folder
    for name in ("uploads/1", "uploads/2/1", "uploads/22/1"):
        objects.put_bytes(name, b"x")
        os.utime(path / name, (1000, 1000))
    objects.delete_older("uploads", before=2000, kept=["uploads/1", "uploads/2"])
    assert files(path) == ["uploads/1", "uploads/2/1"]


def test_a_store_that_is_there_answers(objects):
    objects.ping()


def test_a_folder_that_is_gone_is_told(folder):
    objects, path = folder
    path.rmdir()
    with pytest.raises(RuntimeError, match="is gone or cannot be written"):
        objects.ping()


def test_objects_are_listed_below_a_prefix_with_their_age(objects):
    for key in ("results/1/1/a", "results/2/1/b", "models/c"):
        objects.put_bytes(key, b"x")
    found = dict(objects.list("results"))
    assert sorted(found) == ["results/1/1/a", "results/2/1/b"]
    assert all(abs(age - time.time()) < 60 for age in found.values())


def test_what_is_stored_twice_is_what_was_stored_last(objects):
    objects.put_bytes("a", b"first")
    objects.put_stream("a", iter([b"second"]))
    assert objects.get_bytes("a") == b"second"


# S3


@pytest.mark.integration
def test_keys_lie_below_the_prefix(s3):
    objects, server = s3
    objects.put_bytes("models/a", b"x")
    assert server.objects() == ["some/prefix/models/a"]


@pytest.mark.integration
def test_a_bucket_without_a_prefix(s3_server):
    objects = ObjectStore("s3://curvature")
    objects.put_bytes("models/a", b"x")
    objects.move("models/a", "models/b")
    assert s3_server.objects() == ["models/b"]


@pytest.mark.integration
def test_a_bucket_that_is_not_there_is_told(s3_server):
    with pytest.raises(Exception, match="NoSuchBucket"):
        ObjectStore("s3://another/prefix").ping()


@pytest.mark.integration
def test_uploads_that_nobody_finished_are_given_up(s3):
    objects, server = s3
    for key in ("uploads/old", "uploads/kept", "models/old"):
        objects.bucket.begin(key)
    objects.delete_older("uploads", before=time.time() - 60)
    assert len(server.unfinished()) == 3
    objects.delete_older("uploads", before=time.time() + 60, kept=["uploads/kept"])
    assert sorted(server.unfinished()) == ["some/prefix/models/old", "some/prefix/uploads/kept"]


def test_a_store_elsewhere_must_be_encrypted(monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    with pytest.raises(ValueError, match="AWS_ALLOW_HTTP"):
        ObjectStore("s3://bucket/prefix")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    ObjectStore("s3://bucket/prefix")


def test_missing_credentials_are_named(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket/prefix")


def test_amazons_own_store_is_addressed_in_its_region(monkeypatch):
    given = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "eu-central-1", "ENDPOINT_URL": ""}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    store = ObjectStore("s3://bucket/prefix")
    assert store.bucket.sign_download("k", 60).startswith("https://bucket.s3.eu-central-1.amazonaws.com/prefix/k?")
    assert obstore.sign(store._store, "GET", "k", timedelta(60)).startswith(
        "https://s3.eu-central-1.amazonaws.com/bucket/prefix/k?"
    )


@pytest.mark.integration
def test_a_large_object_is_copied_in_parts(s3):
    objects, _ = s3
    data = os.urandom(11 * 2**20)
    objects.put_bytes("uploads/1", data)
    objects.bucket.copy("uploads/1", "models/2", part_bytes=5 * 2**20)
    assert objects.get_bytes("models/2") == data
    with pytest.raises(FileNotFoundError):
        objects.bucket.copy("uploads/none", "models/3")
