"""Jobs as records, the same on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from tests.state.holders import REQUEST, age, claimed, make

from curvature_protocol.jobs import JobKind, JobStatus
from curvature_state import jobs
from curvature_state.artefacts import ArtefactMissing, find_artefact, record_artefact
from curvature_state.endings import succeed
from curvature_state.jobs import NewJob, ReadyResult
from curvature_state.tables import ArtefactRow, JobArtefactRow, ResultUseRow, TenantRow
from curvature_state.tenants import QueueFull

# Creation


def test_a_new_job_is_queued_and_reads_back_whole(database):
    job = make(database)
    assert job.status == JobStatus.QUEUED
    assert jobs.get_job(database, job.id) == job
    assert job.request == REQUEST
    assert job.metadata == {"run": "7"}
    assert job.created_at.tzinfo is not None


def test_an_unknown_job_is_none(database):
    assert jobs.get_job(database, "0" * 32) is None


def test_one_idempotency_key_makes_one_job(database):
    first = jobs.create_job(database, NewJob(REQUEST, "d", "key"))
    again = jobs.create_job(database, NewJob(REQUEST, "other", "key"))
    assert (first.repeated, again.repeated) == (False, True)
    assert again.job.id == first.job.id
    assert again.body_digest == "d"


def test_jobs_without_a_key_are_all_new(database):
    assert make(database).id != make(database).id


def test_concurrent_twins_make_one_job(database):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: jobs.create_job(database, NewJob(REQUEST, "d", "twin")), range(8)))
    assert len({created.job.id for created in made}) == 1
    assert [created.repeated for created in made].count(False) == 1


def test_a_job_whose_upload_is_gone_is_not_written(database):
    record_artefact(database, "models", "a" * 64, 1)
    references = frozenset({("models", "a" * 64), ("batches", "b" * 64)})
    with pytest.raises(ArtefactMissing) as caught:
        make(database, artefacts=references)
    assert (caught.value.kind, caught.value.sha256) == ("batches", "b" * 64)
    assert jobs.list_jobs(database, tenant="default", status=None, limit=9, before=None) == []


def test_a_job_notes_what_it_needs_and_that_it_was_used(database):
    record_artefact(database, "models", "a" * 64, 1)
    job = make(database, artefacts=frozenset({("models", "a" * 64)}))
    with database.read() as session:
        assert session.get(JobArtefactRow, (job.id, "models", "a" * 64)) is not None
        first = session.get(ArtefactRow, ("models", "a" * 64)).used_at
    assert first is not None
    make(database, artefacts=frozenset({("models", "a" * 64)}))
    with database.read() as session:
        assert session.get(ArtefactRow, ("models", "a" * 64)).used_at == first  # once a minute
    assert find_artefact(database, "models", "a" * 64) is not None


def test_a_job_over_a_data_set_waits_for_its_shards(database):
    parts = tuple(NewJob({"part": n}, "d", kind=JobKind.SHARD) for n in range(3))
    job = make(database, parts=parts)
    assert (job.status, job.parts, job.progress.phase, job.progress.total) == ("waiting", 3, "shards", 3)
    shards = jobs.list_jobs(database, tenant="default", kind=JobKind.SHARD, status=None, limit=9, before=None)
    assert [(s.status, s.parent, s.request["part"]) for s in shards] == [("queued", job.id, n) for n in (2, 1, 0)]
    found = jobs.list_jobs(database, tenant="default", status=None, limit=9, before=None)
    assert [found_job.id for found_job in found] == [job.id]


def test_a_job_whose_result_is_there_is_over_at_once(database):
    source = claimed(database)
    succeed(database, source.id, source.attempt)
    job = make(database, result=ReadyResult(("told",), (source.id,), 10))
    assert (job.status, job.attempt, job.warnings) == (JobStatus.SUCCEEDED, 1, ("told",))
    with database.read() as session:
        assert session.get(ResultUseRow, (job.id, source.id)) is not None


def test_a_full_queue_takes_no_more(database):
    make(database)
    with database.write() as session:
        session.get(TenantRow, "default").max_queued = 2
    make(database)
    with pytest.raises(QueueFull) as caught:
        make(database)
    assert (caught.value.limit, caught.value.queued, caught.value.wanted) == (2, 2, 1)
    assert make(database, tenant="other").status == JobStatus.QUEUED


def test_of_a_job_over_a_data_set_only_its_shards_are_queued(database):
    make(database)
    with database.write() as session:
        session.get(TenantRow, "default").max_queued = 3
    parts = tuple(NewJob({"part": n}, "d", kind=JobKind.SHARD) for n in range(2))
    assert make(database, parts=parts).status == JobStatus.WAITING
    with pytest.raises(QueueFull):
        make(database)


# Listing


def test_the_list_has_the_newest_first_and_pages_without_gap_or_repeat(database):
    made = [make(database).id for _ in range(5)]
    seen, before = [], None
    while page := jobs.list_jobs(database, tenant="default", status=None, limit=2, before=before):
        seen += [job.id for job in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == made[::-1]


def test_pages_split_jobs_of_one_moment(database):
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    ids = sorted((make(database).id for _ in range(3)), reverse=True)
    for job_id in ids:
        age(database, job_id, created_at=moment)
    rest = jobs.list_jobs(database, tenant="default", status=None, limit=9, before=(moment, ids[0]))
    assert [job.id for job in rest] == ids[1:]


def test_the_list_filters_by_state(database):
    make(database)
    held = claimed(database)
    running = jobs.list_jobs(database, tenant="default", status=JobStatus.RUNNING, limit=9, before=None)
    assert [job.id for job in running] == [held.id]
