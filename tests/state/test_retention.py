"""Age limits, eviction of what was least recently used, pins, and what is never taken."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from tests.state.holders import hold, make
from tests.state.stocks import Stock

from curvature_protocol.jobs import JobKind
from curvature_protocol.names import artefact_key
from curvature_state import ObjectStore
from curvature_state.artefacts import ArtefactMissing, record_artefact
from curvature_state.deletion import delete_job
from curvature_state.endings import fail, request_cancel, retry
from curvature_state.jobs import NewJob, ReadyResult, SweepPlace, create_job, problem
from curvature_state.policy import Policy
from curvature_state.retention import Line, Report, collect
from curvature_state.tables import ArtefactRow, JobRow, SweepRow
from curvature_state.uses import ResultGone

MONTH = timedelta(days=30)
AT_ONCE = timedelta(0)
BROKEN = problem("internal_error", "x")


@pytest.fixture
def stock(database, objects):
    return Stock(database, objects)


def run(stock, **limits):
    """A collection that does what its dry run said, and nothing when it is run again; its report."""
    policy = Policy(**{"grace": AT_ONCE, **limits})
    before = (stock.stored(), stock.jobs(), stock.uploads(), stock.notes())
    foreseen = collect(stock.database, stock.objects, policy, dry_run=True)
    assert (stock.stored(), stock.jobs(), stock.uploads(), stock.notes()) == before
    report = collect(stock.database, stock.objects, policy)
    assert report == foreseen
    assert collect(stock.database, stock.objects, policy) == Report()
    return report


# Ages


def test_without_limits_nothing_goes(stock):
    stock.result(days=1000)
    stock.upload("m", days=1000)
    assert run(stock) == Report()


def test_old_results_go_and_their_jobs_stay(stock):
    old, young = stock.result(size=70, days=31, cached={"k": "grad"}), stock.result(days=29)
    assert run(stock, keep_results=MONTH) == Report((Line("results", "not used for 30 days", 1, 70),))
    assert stock.jobs() == {old, young}
    assert (stock.has_result(old), stock.has_result(young)) == (False, True)
    assert (stock.has_files(old), stock.has_files(young)) == (False, True)
    assert stock.cached() == {}


def test_old_jobs_go_whole(stock):
    old, young = stock.result(size=70, days=31), stock.result(days=29)
    failed = make(stock.database).id
    fail(stock.database, failed, hold(stock.database, failed).attempt, BROKEN)
    stock.age(failed, 31)
    waiting = make(stock.database).id
    assert run(stock, keep_jobs=MONTH) == Report((Line("jobs", "over for 30 days", 2, 70),))
    assert stock.jobs() == {young, waiting}
    assert not stock.has_files(old)


def test_plans_and_inspections_have_a_limit_of_their_own(stock):
    plan = stock.result(size=1, days=31, kind=JobKind.PLAN)
    inspection = stock.result(size=2, days=31, kind=JobKind.INSPECTION)
    analysis = stock.result(days=31)
    assert run(stock, keep_jobs=timedelta(days=40), keep_results=timedelta(days=40)) == Report()
    why = "not used for 30 days"
    lines = (Line("inspections", why, 1, 2), Line("plans", why, 1, 1))
    assert run(stock, keep_plans=MONTH) == Report(lines)
    assert stock.jobs() == {analysis}
    assert not stock.has_files(plan)
    assert not stock.has_files(inspection)


def test_old_uploads_go_with_what_was_made_of_them(stock):
    old, young = stock.upload("m", days=31, size=10), stock.upload("b", "batches", days=29)
    assert run(stock, keep_uploads=MONTH) == Report((Line("models", "not used for 30 days", 1, 10),))
    assert stock.uploads() == {young}
    assert stock.stored() == [artefact_key(*young)]
    assert old not in stock.uploads()


def test_a_data_set_goes_with_its_shards(stock):
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard, size=10, days=40)
    stock.finish(parent, size=1, days=31, sources=shards)
    assert run(stock, keep_jobs=MONTH) == Report((Line("jobs", "over for 30 days", 1, 21),))
    assert stock.stored() == []


def test_a_sweep_goes_when_all_of_it_is_old(stock):
    stock.sweep("s" * 32, days=50)
    jobs = [stock.result(size=5, days=days, sweep=SweepPlace("s" * 32, days, {})) for days in (40, 29)]
    assert run(stock, keep_jobs=MONTH) == Report()
    assert stock.jobs() == set(jobs)
    stock.age(jobs[1], 31)
    expected = (
        Line("jobs", "over for 30 days", 2, 10),
        Line("sweeps", "all of their jobs are removed", 1, 0),
    )
    assert run(stock, keep_jobs=MONTH) == Report(expected)
    with stock.database.read() as session:
        assert session.get(SweepRow, "s" * 32) is None


# What is never taken


def test_what_a_queued_job_needs_stays(stock):
    needed, idle = stock.upload("m", days=100), stock.upload("n", days=100)
    make(stock.database, artefacts=frozenset({needed}))
    stock.age_upload(needed, 100)
    run(stock, keep_uploads=MONTH, max_stored_bytes=1)
    assert stock.uploads() == {needed}
    assert idle not in stock.uploads()


@pytest.mark.parametrize("state", ["queued", "running", "waiting"])
def test_an_inspection_needs_its_model_as_any_job_its_uploads(stock, state):
    model = stock.upload("m", days=100)
    references = frozenset({model})
    parts = (NewJob({}, "d", kind=JobKind.SHARD, artefacts=references),) if state == "waiting" else ()
    job_id = make(stock.database, artefacts=references, parts=parts).id
    if state == "running":
        hold(stock.database, job_id)
    stock.age_upload(model, 100)
    assert run(stock, keep_uploads=MONTH, max_stored_bytes=1) == Report()


def test_shards_stay_until_they_are_merged(stock):
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard, days=100)
    limits = {"keep_results": MONTH, "keep_jobs": MONTH, "max_stored_bytes": 1}
    assert run(stock, **limits) == Report()
    held = hold(stock.database, parent)
    assert run(stock, **limits) == Report()
    fail(stock.database, parent, held.attempt, BROKEN)
    run(stock, **limits)
    assert not any(stock.has_files(shard) for shard in shards)


def test_shards_that_were_removed_are_computed_again_by_a_retry(stock):
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard, days=100)
    fail(stock.database, parent, hold(stock.database, parent).attempt, BROKEN)
    stock.age(shards[1], 0)
    run(stock, keep_results=MONTH)
    ending = retry(stock.database, parent)
    assert (ending.job.status, ending.job.progress.done) == ("waiting", 1)
    assert [job.id for job in ending.others] == [shards[0]]
    stock.finish(shards[0])
    assert hold(stock.database, parent) is not None


def test_a_job_is_not_taken_up_again_without_its_uploads(stock):
    model = stock.upload("m", days=100)
    job_id = make(stock.database, artefacts=frozenset({model})).id
    request_cancel(stock.database, job_id)
    stock.age_upload(model, 100)
    run(stock, keep_uploads=MONTH)
    with pytest.raises(ArtefactMissing):
        retry(stock.database, job_id)
    stock.upload("m", days=100)
    assert retry(stock.database, job_id).job.status == "queued"
    stock.age_upload(model, 100)
    run(stock, keep_uploads=MONTH)
    assert stock.uploads() == {model}


def test_what_is_pinned_stays(stock):
    job_id, upload = stock.result(days=100), stock.upload("m", days=100)
    parent, shards = stock.data_set()
    for shard in shards:
        stock.finish(shard, days=100)
    stock.finish(parent, days=100)
    for pinned in (job_id, parent):
        stock.pin(JobRow, pinned)
    stock.pin(ArtefactRow, upload)
    limits = {"keep_jobs": MONTH, "keep_results": MONTH, "keep_uploads": MONTH, "keep_plans": MONTH}
    assert run(stock, max_stored_bytes=1, **limits) == Report()


# Shared files


def test_a_result_that_others_use_stays_as_long_as_they(stock):
    source = stock.result(size=100, days=100)
    user = stock.result(size=1, days=5, sources=[source])
    stock.age(source, 100)
    assert run(stock, keep_results=MONTH) == Report()
    stock.age(user, 31)
    assert run(stock, keep_results=MONTH) == Report((Line("results", "not used for 30 days", 2, 101),))
    assert stock.stored() == []


def test_files_of_an_old_job_stay_for_the_sake_of_a_young_one(stock):
    source = stock.result(size=100, days=100)
    user = stock.result(size=1, days=5, sources=[source])
    stock.age(source, 100)
    assert run(stock, keep_jobs=MONTH) == Report((Line("jobs", "over for 30 days", 1, 0),))
    assert stock.jobs() == {user}
    assert stock.has_files(source)
    stock.age(user, 31)
    expected = (
        Line("files", "of deleted jobs, and not used any more", 1, 100),
        Line("jobs", "over for 30 days", 1, 1),
    )
    assert run(stock, keep_jobs=MONTH) == Report(expected)
    assert stock.stored() == []


def test_chains_of_uses_go_from_their_end(stock):
    ids = [stock.result(days=100)]
    for _ in range(3):
        ids.append(stock.result(sources=ids[-1:]))
    for job_id in ids:
        stock.age(job_id, 100)
    run(stock, keep_results=MONTH)
    assert stock.stored() == []


# Sizes


def test_the_least_recently_used_goes_first_down_to_nine_tenths(stock):
    oldest = stock.result(size=300, days=9)
    upload = stock.upload("m", days=8, size=300)
    younger = stock.result(size=300, days=7)
    youngest = stock.upload("b", "batches", days=6, size=300)
    assert run(stock, max_stored_bytes=1200) == Report()
    why = "more than 1100 bytes in all"
    assert run(stock, max_stored_bytes=1100) == Report((Line("results", why, 1, 300),))
    assert not stock.has_result(oldest)
    assert run(stock, max_stored_bytes=899).lines[0].kind == "models"
    assert upload not in stock.uploads()
    run(stock, max_stored_bytes=599)
    assert not stock.has_result(younger)
    assert stock.uploads() == {youngest}


def test_what_was_used_a_moment_ago_is_not_evicted(stock):
    stock.result(size=300)
    stock.upload("m", size=300)
    assert run(stock, max_stored_bytes=1, grace=timedelta(minutes=10)) == Report()


def test_a_result_passed_over_goes_right_after_its_last_user(stock):
    source = stock.result(size=500, days=9)
    between = stock.result(size=500, days=6)
    user = stock.result(size=1, days=8, sources=[source])
    stock.age(source, 9)
    run(stock, max_stored_bytes=1000)
    assert [stock.has_result(job_id) for job_id in (source, user, between)] == [False, False, True]


def test_files_kept_for_others_count_and_go_with_the_last_of_them(stock):
    source = stock.result(size=500, days=9)
    user = stock.result(size=1, days=8, sources=[source])
    delete_job(stock.database, source)
    spared = stock.result(size=400, days=1)
    expected = (
        Line("files", "of deleted jobs, and not used any more", 1, 500),
        Line("results", "more than 900 bytes in all", 1, 1),
    )
    assert run(stock, max_stored_bytes=900) == Report(expected)
    assert (stock.has_result(user), stock.has_result(spared)) == (False, True)
    assert not stock.has_files(source)


def test_a_dry_run_foresees_what_a_mixed_collection_removes(stock):
    sources = [stock.result(size=50 + n, days=40 + n) for n in range(4)]
    for n, source in enumerate(sources):
        stock.result(size=n + 1, days=35 - 3 * n, sources=sources[: n + 1], artefacts=frozenset())
        stock.age(source, 40 + n)
        stock.upload(f"model {n}", days=20 + 5 * n)
    delete_job(stock.database, sources[0])
    limits = {"keep_results": MONTH, "keep_uploads": MONTH, "keep_jobs": timedelta(days=42)}
    report = run(stock, max_stored_bytes=150, **limits)
    assert {line.kind for line in report.lines} == {"files", "jobs", "results", "models"}


# On S3


@pytest.mark.integration
def test_files_on_s3_go_with_their_records(database, s3_server):
    stock = Stock(database, ObjectStore("s3://curvature/some/prefix"))
    old, young = stock.result(days=31), stock.result()
    stock.upload("m", days=31)
    run(stock, keep_jobs=MONTH, keep_uploads=MONTH)
    assert stock.jobs() == {young}
    assert {key.split("/")[1] for key in stock.stored()} == {young}
    assert old not in " ".join(s3_server.objects())


# At once


def test_two_collections_at_once_remove_each_thing_once(stock, database, objects):
    for n in range(60):
        stock.result(days=100)
        stock.upload(f"model {n}", days=100)
    policy = Policy(keep_results=MONTH, keep_uploads=MONTH)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: collect(database, objects, policy), range(3)))
    count = sum(line.count for report in reports for line in report.lines if line.why.startswith("not used"))
    assert count == 120
    collect(database, objects, policy)
    assert stock.notes() == set()
    assert stock.stored() == []


def test_no_queued_job_loses_its_uploads_to_collections_at_the_same_time(stock, database, objects):
    """Submitters upload what they find missing, as clients do, while everything unused is taken at once."""
    policy = Policy(keep_uploads=AT_ONCE, grace=AT_ONCE)

    def submit(number):
        kept = number % 4 == 0
        name = f"{number + 100 if kept else number % 3:064d}"
        references = [("models", name), ("batches", name)]
        while True:
            for kind, sha256 in references:
                if objects.head(artefact_key(kind, sha256)) is None:
                    put(kind, sha256)
            try:
                job_id = make(database, artefacts=frozenset(references)).id
            except ArtefactMissing as error:
                put(error.kind, error.sha256)
                continue
            missing = [r for r in references if objects.head(artefact_key(*r)) is None]
            if not kept:
                request_cancel(database, job_id)
            return missing

    def put(kind, sha256):
        while True:
            objects.put_bytes(artefact_key(kind, sha256), b"x")
            record_artefact(database, kind, sha256, 1)
            if objects.head(artefact_key(kind, sha256)) is not None:
                return

    removed, rounds = [], 0
    with ThreadPoolExecutor(6) as pool:
        while not removed and rounds < 20:  # all may have been submitted before a collection found anything
            rounds += 1
            jobs = [pool.submit(submit, number) for number in range(60)]
            while not all(job.done() for job in jobs):
                removed += collect(database, objects, policy).lines
            assert [job.result() for job in jobs] == [[]] * 60
    assert removed
    kept = {(kind, f"{number + 100:064d}") for number in range(0, 60, 4) for kind in ("models", "batches")}
    assert kept <= stock.uploads()
    assert kept <= {tuple(key.split("/")) for key in stock.stored()}


def test_no_answer_from_the_cache_loses_its_files_to_collections_at_the_same_time(stock, database, objects):
    policy = Policy(keep_results=AT_ONCE, grace=AT_ONCE)

    def ask(_):
        source = stock.result(days=1)
        try:
            job = create_job(database, NewJob({}, "d", result=ReadyResult((), (source,), 1))).job
        except ResultGone:
            return "gone"
        kept = stock.has_files(source)
        with database.read() as session:  # its own may be evicted by now, and then its source
            still = session.get(JobRow, job.id).result_bytes is not None
        return "kept" if kept else "lost" if still else "evicted"

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(40)]
        while not all(job.done() for job in asked):
            collect(database, objects, policy)
        found = {job.result() for job in asked}
    assert "lost" not in found
