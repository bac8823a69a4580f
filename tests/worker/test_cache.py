import hashlib

import pytest

from curvature_protocol.names import artefact_key
from curvature_state import ObjectStore
from curvature_worker.cache import ArtefactCache, Inbox, place
from curvature_worker.errors import JobRefused, LeaseLost

DATA = b"model" * 1000
SHA = hashlib.sha256(DATA).hexdigest()


def go_on():
    return


@pytest.fixture
def store():
    """A store that is no folder, like S3."""
    made = ObjectStore("memory:///")
    made.put_bytes(artefact_key("models", SHA), DATA)
    return made


@pytest.fixture
def cache(store, tmp_path):
    return ArtefactCache(store, tmp_path / "cache", 20_000)


def test_an_upload_is_fetched(cache):
    assert cache.fetch_upload("models", SHA, go_on).read_bytes() == DATA


def test_a_second_fetch_needs_no_store(cache, store):
    cache.fetch_upload("models", SHA, go_on)
    store.delete(artefact_key("models", SHA))
    assert cache.fetch_upload("models", SHA, go_on).read_bytes() == DATA


def test_a_store_that_is_a_folder_is_read_in_place(tmp_path):
    store = ObjectStore(f"file://{tmp_path}/store")
    store.put_bytes(artefact_key("models", SHA), DATA)
    cache = ArtefactCache(store, tmp_path / "cache", 100)
    assert cache.fetch_upload("models", SHA, go_on) == tmp_path / "store" / "models" / SHA


def test_damaged_bytes_are_refused_and_not_kept(cache, store, tmp_path):
    store.put_bytes(artefact_key("models", SHA), b"other")
    with pytest.raises(JobRefused) as caught:
        cache.fetch_upload("models", SHA, go_on)
    assert (caught.value.code, caught.value.param) == ("hash_mismatch", "model")
    assert hashlib.sha256(b"other").hexdigest() in caught.value.detail
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_hashing_found_is_passed_on(store, tmp_path):
    store.put_bytes(artefact_key("batches", SHA), b"other")
    said = []
    cache = ArtefactCache(store, tmp_path / "cache", 20_000, lambda *verdict: said.append(verdict))
    cache.fetch_upload("models", SHA, go_on)
    cache.fetch_upload("models", SHA, go_on)  # from the disk: nothing new
    with pytest.raises(JobRefused):
        cache.fetch_upload("batches", SHA, go_on)
    assert said == [("models", SHA, True), ("batches", SHA, False)]


def test_bytes_that_are_replaced_while_they_are_read_are_read_again(store, tmp_path):
    key = artefact_key("models", SHA)
    store.put_bytes(key, b"other")
    said = []
    cache = ArtefactCache(store, tmp_path / "cache", 20_000, lambda *verdict: said.append(verdict))
    path = cache.fetch_upload("models", SHA, lambda: store.put_bytes(key, DATA))
    assert path.read_bytes() == DATA
    assert said == [("models", SHA, True)]


@pytest.mark.parametrize(("kind", "code"), [("models", "model_not_found"), ("batches", "batch_not_found")])
def test_what_is_gone_is_named(cache, kind, code):
    with pytest.raises(JobRefused) as caught:
        cache.fetch_upload(kind, "0" * 64, go_on)
    assert caught.value.code == code
    assert caught.value.remedy


def test_an_object_that_is_not_there_is_none(cache):
    assert cache.fetch("admitted/x/1", go_on) is None


def test_a_transfer_ends_when_the_job_does(cache, tmp_path):
    def lost():
        raise LeaseLost

    with pytest.raises(LeaseLost):
        cache.fetch_upload("models", SHA, lost)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_least_recently_used_file_goes_first(store, tmp_path):
    for name in "abc":
        store.put_bytes(name, name.encode() * 40)
    cache = ArtefactCache(store, tmp_path / "cache", 100)
    for name in "abc":
        cache.fetch(name, go_on)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["b", "c"]


def test_what_was_just_fetched_stays_even_if_it_is_too_large(store, tmp_path):
    cache = ArtefactCache(store, tmp_path / "cache", 10)
    assert cache.fetch_upload("models", SHA, go_on).is_file()


def test_placing_links_where_it_can(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    place(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino


def test_placing_copies_where_it_cannot_link(tmp_path, other_file_system):
    source = other_file_system / "a"
    source.write_bytes(DATA)
    place(source, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA


def test_an_inbox_holds_a_bounded_number_of_models(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(DATA)
    folder = tmp_path / "in"
    folder.mkdir()
    inbox = Inbox(folder, 2)
    for sha in ("a", "b", "a", "c"):
        inbox.place_model(sha, source)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "c"]
