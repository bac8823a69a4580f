"""Deleting jobs, sweeps and uploads by name."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from tests.state.holders import await_blocked_session, claimed, hold, make
from tests.state.stocks import Stock

from curvature_state import Database
from curvature_state.artefacts import ArtefactMissing, find_artefact, record_artefact
from curvature_state.cache import LoadedModel, find_cached, find_digest, record_digest
from curvature_state.deletion import InUse, NotOver, delete_artefact, delete_job, delete_sweep
from curvature_state.dropping import drop_artefacts, drop_jobs, drop_results
from curvature_state.endings import Success, confirm_cancel, fail, request_cancel, succeed
from curvature_state.jobs import NewJob, ReadyResult, SweepPlace, get_job, insert_jobs, problem
from curvature_state.removals import clear_removals
from curvature_state.retention import Policy, collect
from curvature_state.tables import ArtefactRow, JobArtefactRow, JobRow, RemovalRow, SweepRow, WebhookRow

BROKEN = problem("internal_error", "x")


@pytest.fixture
def stock(database, objects):
    return Stock(database, objects)


def clear(stock):
    return clear_removals(stock.database, stock.objects)


# Jobs


def test_a_job_goes_with_its_result_and_its_place_in_the_cache(database, stock):
    model = stock.upload("m")
    job_id = stock.result(cached={"k": "grad"}, artefacts=frozenset({model}))
    assert delete_job(database, job_id) == [job_id]
    assert get_job(database, job_id) is None
    assert find_cached(database, "default", ["k"]) == {}
    clear(stock)
    assert not stock.has_files(job_id)
    assert stock.notes() == set()
    with database.read() as session:
        assert session.get(JobArtefactRow, (job_id, *model)) is None
    assert delete_job(database, job_id) is None


def test_files_of_all_attempts_go(database, stock, objects):
    job_id = claimed(database).id
    objects.put_bytes(f"results/{job_id}/1/grad.safetensors", b"x")
    fail(database, job_id, 1, BROKEN)
    delete_job(database, job_id)
    clear(stock)
    assert not stock.has_files(job_id)
    assert not objects.local_path(f"results/{job_id}").exists()


@pytest.mark.parametrize("state", ["queued", "running", "cancelling", "waiting"])
def test_a_job_that_is_not_over_is_not_deleted(database, stock, state):
    job_id = stock.data_set()[0] if state == "waiting" else make(database).id
    if state in ("running", "cancelling"):
        hold(database, job_id)
    if state == "cancelling":
        request_cancel(database, job_id)
    with pytest.raises(NotOver) as caught:
        delete_job(database, job_id)
    assert (caught.value.job_id, caught.value.status) == (job_id, state)
    assert get_job(database, job_id) is not None


def test_a_pinned_job_is_not_deleted(database, stock):
    job_id = stock.result()
    stock.pin(JobRow, job_id)
    with pytest.raises(InUse, match="pinned"):
        delete_job(database, job_id)


def test_shared_files_stay_until_the_last_that_uses_them_is_gone(database, stock):
    source = stock.result(cached={"k": "grad"})
    users = [stock.result(sources=[source]) for _ in range(2)]
    delete_job(database, source)
    clear(stock)
    assert stock.has_files(source)
    assert find_cached(database, "default", ["k"]) == {}
    delete_job(database, users[0])
    clear(stock)
    assert stock.has_files(source)
    assert delete_job(database, users[1]) == [users[1], source]
    clear(stock)
    assert stock.stored("results") == []
    assert stock.notes() == set()


def test_a_data_set_takes_its_shards_along(database, stock):
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard)
    stock.finish(parent, sources=shards)
    with pytest.raises(InUse, match=f"part of job {parent}"):
        delete_job(database, shards[0])
    delete_job(database, parent)
    clear(stock)
    assert stock.jobs() == set()
    assert stock.stored("results") == []


def test_shards_that_another_result_uses_keep_their_files(database, stock):
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard)
    stock.finish(parent, sources=shards)
    user = stock.result(sources=[shards[1]])
    delete_job(database, parent)
    clear(stock)
    assert [stock.has_files(job_id) for job_id in (parent, *shards)] == [False, False, True]
    delete_job(database, user)
    clear(stock)
    assert stock.stored("results") == []


def test_a_data_set_stays_while_a_shard_is_being_stopped(database, stock):
    parent, shards = stock.data_set()
    held = hold(database, shards[0])
    request_cancel(database, parent)
    with pytest.raises(NotOver) as caught:
        delete_job(database, parent)
    assert caught.value.job_id == shards[0]
    confirm_cancel(database, held.id, held.attempt)
    assert delete_job(database, parent) is not None


def test_a_deleted_job_tells_nobody(database, stock):
    job_id = stock.result()
    with database.write() as session:
        session.add(webhook("w", "job", job_id))
    delete_job(database, job_id)
    with database.read() as session:
        assert session.get(WebhookRow, "w") is None


def webhook(name, subject, subject_id):
    row = {"tenant": "default", "url": "http://x", "state": "waiting", "attempts": 0}
    moment = datetime.now(UTC)
    return WebhookRow(id=name, subject=subject, subject_id=subject_id, next_at=moment, created_at=moment, **row)


# Sweeps


def in_sweep(row):
    return SweepPlace("s" * 32, row, {})


def test_a_sweep_goes_with_its_jobs(database, stock, monkeypatch):
    monkeypatch.setattr("curvature_state.deletion._PER_TRANSACTION", 2)
    stock.sweep("s" * 32)
    for row in range(5):
        stock.result(sweep=in_sweep(row))
    other = stock.result()
    assert delete_sweep(database, "default", "s" * 32)
    clear(stock)
    assert stock.jobs() == {other}
    assert stock.notes() == set()
    assert not delete_sweep(database, "default", "s" * 32)


def test_a_sweep_of_another_tenant_is_not_there(database, stock):
    stock.sweep("s" * 32)
    assert not delete_sweep(database, "other", "s" * 32)
    with database.read() as session:
        assert session.get(SweepRow, "s" * 32) is not None


def test_a_sweep_with_an_unfinished_job_stays_whole(database, stock):
    stock.sweep("s" * 32)
    done = stock.result(sweep=in_sweep(0))
    queued = make(database, sweep=in_sweep(1)).id
    with pytest.raises(NotOver) as caught:
        delete_sweep(database, "default", "s" * 32)
    assert caught.value.job_id == queued
    assert stock.jobs() == {done, queued}


def test_the_next_collection_goes_on_with_a_sweep_whose_deletion_was_cut_off(database, stock, monkeypatch):
    stock.sweep("s" * 32)
    for row in range(3):
        stock.result(sweep=in_sweep(row))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("curvature_state.deletion._clear_sweep", die)
    with pytest.raises(KeyboardInterrupt):
        delete_sweep(database, "default", "s" * 32)
    assert len(stock.jobs()) == 3
    foreseen = collect(database, stock.objects, Policy(), dry_run=True)
    assert collect(database, stock.objects, Policy()) == foreseen
    assert stock.jobs() == set()
    assert stock.notes() == set()
    assert stock.stored("results") == []


# Uploads


def test_an_upload_goes_with_its_admitted_form_and_digest(database, stock):
    kind, sha256 = stock.upload("m")
    model = LoadedModel(sha256, eval=True, engine_version="1")
    record_digest(database, model, "d" * 64)
    assert delete_artefact(database, kind, sha256, "default")
    assert find_artefact(database, kind, sha256) is None
    assert find_digest(database, model) is None
    clear(stock)
    assert stock.stored() == []
    assert not delete_artefact(database, kind, sha256, "default")


def test_the_same_bytes_of_another_kind_stay(database, stock):
    model, loss = stock.upload("m"), stock.upload("m", "losses")
    delete_artefact(database, *model, "default")
    clear(stock)
    assert stock.stored() == sorted([f"admitted/{loss[1]}/1", f"losses/{loss[1]}"])


def test_what_an_unfinished_job_needs_is_not_deleted(database, stock):
    model = stock.upload("m")
    job_id = make(database, artefacts=frozenset({model})).id
    with pytest.raises(InUse, match=f"job {job_id}, which is queued"):
        delete_artefact(database, *model, "default")
    held = hold(database, job_id)
    succeed(database, job_id, held.attempt, Success())
    assert delete_artefact(database, *model, "default")


def test_what_anothers_job_refers_to_is_not_deleted_and_the_job_not_named(database, stock):
    model = stock.upload("m")
    job_id = stock.result(tenant="other", artefacts=frozenset({model}))
    with pytest.raises(InUse, match="another tenant") as caught:
        delete_artefact(database, *model, "default")
    assert job_id not in str(caught.value)
    assert delete_artefact(database, *model, "other")


def test_a_pinned_upload_is_not_deleted(database, stock):
    model = stock.upload("m")
    stock.pin(ArtefactRow, model)
    with pytest.raises(InUse, match="pinned"):
        delete_artefact(database, *model, "default")


def test_an_upload_that_comes_back_before_its_bytes_went_keeps_them(database, stock):
    kind, sha256 = stock.upload("m")
    delete_artefact(database, kind, sha256, "default")
    record_artefact(database, kind, sha256, 1)
    assert stock.notes() == set()
    clear(stock)
    assert f"models/{sha256}" in stock.stored()


# While somebody else is at it


@pytest.fixture
def postgres_stock(postgres_url, objects):
    database = Database(postgres_url)
    yield Stock(database, objects)
    database.close()


@pytest.mark.integration
def test_a_deletion_waits_for_a_submission_and_then_sees_it(postgres_stock):
    stock, database = postgres_stock, postgres_stock.database
    model = stock.upload("m")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            insert_jobs(session, [NewJob({}, "d", artefacts=frozenset({model}))])
            deletion = pool.submit(delete_artefact, database, *model, "default")
            await_blocked_session(database)
        with pytest.raises(InUse):
            deletion.result()
    assert stock.uploads() == {model}


@pytest.mark.integration
def test_a_submission_waits_for_a_deletion_and_then_misses_the_upload(postgres_stock):
    stock, database = postgres_stock, postgres_stock.database
    model = stock.upload("m")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            assert drop_artefacts(session, [model]) == {model}
            submission = pool.submit(make, database, artefacts=frozenset({model}))
            await_blocked_session(database)
        with pytest.raises(ArtefactMissing):
            submission.result()


@pytest.mark.integration
def test_a_collection_leaves_alone_what_somebody_is_submitting_against(postgres_stock):
    stock, database = postgres_stock, postgres_stock.database
    model, source = stock.upload("m"), stock.result()
    ready = ReadyResult((), (source,), 1)
    with database.write() as session:
        insert_jobs(session, [NewJob({}, "d", artefacts=frozenset({model}), result=ready)])
        with database.write() as other:
            assert drop_artefacts(other, [model]) == set()
            assert drop_results(other, [source]) == set()
            assert drop_jobs(other, [source]) == set()


@pytest.mark.integration
def test_an_upload_that_comes_back_waits_for_the_removal_of_its_bytes(postgres_stock):
    stock, database = postgres_stock, postgres_stock.database
    kind, sha256 = stock.upload("m")
    delete_artefact(database, kind, sha256, "default")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.get(RemovalRow, (kind, sha256, 0), with_for_update=True)
            assert clear_removals(database, stock.objects) == []
            recording = pool.submit(record_artefact, database, kind, sha256, 1)
            await_blocked_session(database)
        assert recording.result().sha256 == sha256
    assert stock.notes() == set()
    assert f"models/{sha256}" in stock.stored()
