"""Result files of attempts that came to nothing."""

import os
import time

import pytest
from tests.state.holders import claimed, hold

from curvature_protocol.names import result_key
from curvature_state.endings import confirm_cancel, fail, request_cancel, succeed
from curvature_state.holding import release
from curvature_state.jobs import problem
from curvature_state.leftovers import remove_leftovers

DAY = 24 * 3600


@pytest.fixture
def plant(objects):
    def store(job_id, attempt, name="variance.safetensors", age_seconds=2 * DAY):
        key = result_key(job_id, attempt, name)
        objects.put_bytes(key, b"x")
        os.utime(objects.local_path(key), (time.time() - age_seconds,) * 2)
        return key

    return store


@pytest.fixture
def sweep(database, objects):
    """Sweeps; returns what is left."""

    def run():
        remove_leftovers(database, objects, time.time() - DAY)
        return [key for key, _ in objects.list("results")]

    return run


def claimed_twice(database):
    """A job in its second attempt, the first handed back."""
    first = claimed(database)
    release(database, first.id, first.attempt)
    return hold(database, first.id)


def test_the_attempt_that_won_stays_and_the_others_go(database, plant, sweep):
    held = claimed_twice(database)
    plant(held.id, 1)
    kept = {plant(held.id, 2), plant(held.id, 2, "manifest.json")}
    succeed(database, held.id, held.attempt)
    assert set(sweep()) == kept


def test_what_a_running_job_writes_stays_however_old(database, plant, sweep):
    held = claimed_twice(database)
    plant(held.id, 1)
    kept = plant(held.id, 2)
    assert sweep() == [kept]
    request_cancel(database, held.id)
    assert sweep() == [kept]


@pytest.mark.parametrize("end", ["failed", "cancelled", "queued"])
def test_of_an_attempt_without_a_result_nothing_stays(database, plant, sweep, end):
    held = claimed_twice(database)
    plant(held.id, 2)
    if end == "failed":
        fail(database, held.id, held.attempt, problem("internal_error", "x"))
    elif end == "cancelled":
        confirm_cancel(database, held.id, held.attempt)
    else:
        release(database, held.id, held.attempt)
    assert sweep() == []


def test_files_of_less_than_a_day_stay(database, plant, sweep):
    held = claimed_twice(database)
    kept = plant(held.id, 1, age_seconds=DAY / 2)
    assert sweep() == [kept]


def test_files_of_jobs_without_a_row_stay(plant, sweep):
    kept = plant("0" * 32, 1)
    assert sweep() == [kept]


def test_many_files_are_looked_up_in_parts(database, plant, sweep, monkeypatch):
    monkeypatch.setattr("curvature_state.leftovers._JOBS_PER_QUERY", 2)
    held = claimed_twice(database)
    for n in range(5):
        plant(held.id, 1, f"{n}.safetensors")
    assert sweep() == []


def test_what_a_killed_process_was_writing_goes(objects, plant, sweep):
    torn = objects.local_path(plant("0" * 32, 1)).rename(objects.local_path("results/x.safetensors#1"))
    sweep()
    assert not torn.exists()
