"""Workers publish themselves and their catalogue."""

from datetime import UTC, datetime, timedelta

from curvature_protocol.catalogue import Catalogue, ExtensionEntry, LossEntry
from curvature_protocol.health import WorkerView
from curvature_state import endings, jobs, workers
from curvature_state.jobs import NewJob
from curvature_state.turns import Claimant, claim_next


def entry(name, summary="s"):
    return ExtensionEntry(
        name=name, summary=summary, kind="tensor", shape="[N]", formula="f", source="s", options={"type": "object"}
    )


def loss_entry(name):
    return LossEntry(name=name, summary="s", options={"type": "object"})


def catalogue(*entries, losses=("mse",), version="1"):
    return Catalogue(engine_version=version, extensions=entries, losses=tuple(loss_entry(name) for name in losses))


def worker(name, seconds_ago=0.0):
    seen_at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    return WorkerView(id=name, device="cpu", engine_version="1", isolation="none", seen_at=seen_at)


def test_a_worker_that_published_itself_is_listed(database):
    workers.publish_worker(database, worker("w1"), catalogue())
    assert [w.id for w in workers.list_workers(database)] == ["w1"]


def test_publishing_again_refreshes(database):
    workers.publish_worker(database, worker("w1", 10), catalogue())
    workers.publish_worker(database, worker("w1"), catalogue())
    (found,) = workers.list_workers(database)
    assert datetime.now(UTC) - found.seen_at < timedelta(seconds=5)


def test_a_silent_worker_is_not_listed_but_its_catalogue_counts(database):
    workers.publish_worker(database, worker("w1", 60), catalogue(entry("mine")))
    assert workers.list_workers(database) == []
    assert [e.name for e in workers.published_catalogue(database).extensions] == ["mine"]


def test_a_silent_workers_catalogue_does_not_count_beside_a_live_one(database):
    workers.publish_worker(database, worker("dead", 60), catalogue(entry("theirs"), entry("gone"), version="0"))
    workers.publish_worker(database, worker("live"), catalogue(entry("theirs")))
    found = workers.published_catalogue(database)
    assert ([e.name for e in found.extensions], found.engine_version) == (["theirs"], "1")


def test_while_all_are_silent_those_count_that_lived_together_last(database):
    workers.publish_worker(database, worker("w1", 7200), catalogue(entry("long gone")))
    workers.publish_worker(database, worker("w2", 65), catalogue(entry("a")))
    workers.publish_worker(database, worker("w3", 60), catalogue(entry("b")))
    assert [e.name for e in workers.published_catalogue(database).extensions] == ["a", "b"]


def test_a_worker_gone_for_a_day_is_forgotten(database):
    workers.publish_worker(database, worker("old", 2 * 24 * 3600), catalogue(entry("old")))
    workers.publish_worker(database, worker("new"), catalogue(entry("new")))
    assert [e.name for e in workers.published_catalogue(database).extensions] == ["new"]


def test_a_worker_that_stops_is_removed(database):
    workers.publish_worker(database, worker("w1"), catalogue())
    workers.remove_worker(database, "w1")
    assert workers.list_workers(database) == []
    assert workers.published_catalogue(database) is None


def test_all_workers_can_be_forgotten(database):
    for name in ("w1", "w2"):
        workers.publish_worker(database, worker(name), catalogue())
    workers.forget_workers(database)
    assert workers.list_workers(database) == []


def test_the_catalogue_is_the_union_and_the_freshest_entry_wins(database):
    older = catalogue(entry("shared", "old"), entry("a"), losses=("mse",))
    newer = catalogue(entry("shared", "new"), entry("b"), losses=("mse", "mine"), version="2")
    workers.publish_worker(database, worker("w1", 5), older)
    workers.publish_worker(database, worker("w2"), newer)
    union = workers.published_catalogue(database)
    assert {e.name: e.summary for e in union.extensions} == {"shared": "new", "a": "s", "b": "s"}
    assert [loss.name for loss in union.losses] == ["mse", "mine"]
    assert union.engine_version == "2"


def full(name, worker_name="gpu-1", **changes):
    return worker(name).model_copy(
        update={"name": worker_name, "memory_bytes": 24 * 2**30, "tags": ("large", "a100"), **changes}
    )


def test_name_memory_and_tags_are_published(database):
    workers.publish_worker(database, full("w1"), catalogue())
    (found,) = workers.list_workers(database)
    assert (found.name, found.memory_bytes, found.tags) == ("gpu-1", 24 * 2**30, ("large", "a100"))
    assert (found.job, found.draining) == (None, False)


def test_a_worker_is_busy_with_the_job_whose_lease_it_holds(database):
    for name in ("w1", "w2"):
        workers.publish_worker(database, full(name), catalogue())
    job = jobs.create_job(database, NewJob({}, "d")).job
    held = claim_next(database, Claimant("w2"), 30)
    assert [w.job for w in workers.list_workers(database)] == [None, job.id]
    endings.request_cancel(database, job.id)
    assert [w.job for w in workers.list_workers(database)] == [None, job.id]
    endings.confirm_cancel(database, job.id, held.attempt)
    assert [w.job for w in workers.list_workers(database)] == [None, None]


def test_publishing_leaves_draining_as_it_is(database):
    workers.publish_worker(database, full("w1"), catalogue())
    assert workers.set_draining(database, "w1", True) == ["w1"]
    workers.publish_worker(database, full("w1", draining=False), catalogue())
    assert workers.list_workers(database)[0].draining is True
    assert workers.is_draining(database, "w1") is True
    assert workers.set_draining(database, "w1", False) == ["w1"]
    workers.publish_worker(database, full("w1", draining=True), catalogue())
    assert workers.is_draining(database, "w1") is False


def test_all_workers_of_a_name_drain_and_no_others(database):
    for name, worker_name in (("w1", "a"), ("w2", "b"), ("w3", "a")):
        workers.publish_worker(database, full(name, worker_name), catalogue())
    assert workers.set_draining(database, "a", True) == ["w1", "w3"]
    assert [w.id for w in workers.list_workers(database) if w.draining] == ["w1", "w3"]


def test_a_worker_that_is_not_there_does_not_drain(database):
    workers.publish_worker(
        database, full("silent").model_copy(update={"seen_at": worker("x", 60).seen_at}), catalogue()
    )
    assert workers.set_draining(database, "silent", True) == []
    assert workers.set_draining(database, "", True) == []
    assert workers.is_draining(database, "nobody") is False
