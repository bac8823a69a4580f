"""Results whose files others' results refer to."""

import pytest
from tests.state.holders import age, claimed, hold, long_ago, make, status
from tests.state.stocks import Stock

from curvature_protocol.jobs import JobStatus
from curvature_state.deletion import delete_job
from curvature_state.dropping import drop_results
from curvature_state.endings import Success, succeed
from curvature_state.jobs import ReadyResult
from curvature_state.tables import JobRow, ResultUseRow
from curvature_state.uses import ResultGone, touch_result


@pytest.fixture
def stock(database, objects):
    return Stock(database, objects)


def used_at(database, job_id):
    with database.read() as session:
        return session.get(JobRow, job_id).used_at


def evict(database, job_id):
    with database.write() as session:
        return drop_results(session, [job_id])


def test_a_result_from_the_cache_counts_as_a_use_of_its_sources(database, stock):
    source = stock.result(days=3)
    before = used_at(database, source)
    job = make(database, result=ReadyResult((), (source,), 1))
    assert used_at(database, source) > before
    with database.read() as session:
        assert session.get(ResultUseRow, (job.id, source)) is not None


def test_no_job_is_written_whose_sources_are_gone(database, stock):
    source = stock.result()
    evict(database, source)
    with pytest.raises(ResultGone) as caught:
        make(database, result=ReadyResult((), (source,), 1))
    assert caught.value.job_ids == {source}
    assert stock.jobs() == {source}


def test_a_running_job_does_not_succeed_on_sources_that_are_gone(database, stock):
    source = stock.result()
    held = claimed(database)
    evict(database, source)
    with pytest.raises(ResultGone):
        succeed(database, held.id, held.attempt, Success(sources=frozenset({source})))
    assert status(database, held.id) == JobStatus.RUNNING
    assert succeed(database, held.id, held.attempt, Success()) is not None


def test_an_unfinished_job_is_no_source(database):
    with pytest.raises(ResultGone):
        make(database, result=ReadyResult((), (claimed(database).id,), 1))


def test_a_deleted_job_is_a_source_as_long_as_its_files_stay(database, stock):
    source = stock.result()
    user = stock.result(sources=[source])
    assert delete_job(database, source) is not None
    other = make(database, result=ReadyResult((), (source, user), 1)).id
    assert delete_job(database, user) is not None
    make(database, result=ReadyResult((), (source,), 1))
    evict(database, other)
    assert ("result", source, 0) in stock.notes()


def test_a_deleted_job_that_nobody_uses_is_no_source(database, stock):
    source = stock.result()
    delete_job(database, source)
    with pytest.raises(ResultGone):
        make(database, result=ReadyResult((), (source,), 1))


def test_reading_is_noted_to_the_minute(database, stock):
    job_id = stock.result()
    recent = used_at(database, job_id)
    touch_result(database, job_id)
    assert used_at(database, job_id) == recent
    age(database, job_id, used_at=long_ago(61))
    touch_result(database, job_id)
    assert used_at(database, job_id) > recent


def test_what_is_being_used_is_not_evicted(database, stock):
    """Whoever evicts sees the use of one who held the result first."""
    source = stock.result()
    held = hold(database, make(database).id)
    succeed(database, held.id, held.attempt, Success(sources=frozenset({source})))
    assert evict(database, source) == set()
    assert stock.has_result(source)
