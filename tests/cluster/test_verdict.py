"""The chaos run's verdict sees what it is there to see."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import delete, update
from tests.cluster.crowd import Outcome
from tests.cluster.verdict import judge
from tests.cluster.workload import Task
from tests.service.planting import build_manifest, safetensors_file
from tests.state.holders import claimed, make

from curvature_protocol.names import result_key
from curvature_state import Database, ObjectStore, migrate
from curvature_state.endings import Success, succeed
from curvature_state.tables import JobRow


@pytest.fixture
def system(tmp_path):
    url = f"sqlite:///{tmp_path / 'curvature.db'}"
    migrate(url)
    return SimpleNamespace(database_url=url, storage_url=(tmp_path / "objects").as_uri())


@pytest.fixture
def database(system):
    database = Database(system.database_url)
    yield database
    database.close()


@pytest.fixture
def objects(system):
    return ObjectStore(system.storage_url)


def finished(database, objects, task=0):
    """A job that succeeded, as its client saw it."""
    job = claimed(database)
    file, start = safetensors_file(range(5))
    manifest = build_manifest(job.id, job.attempt, "variance", start, len(file))
    objects.put_bytes(result_key(job.id, job.attempt, "variance.safetensors"), file)
    objects.put_bytes(result_key(job.id, job.attempt, "manifest.json"), manifest.model_dump_json().encode())
    assert succeed(database, job.id, job.attempt, Success((), len(file)))
    digests = {"variance/0.weight": hashlib.sha256(file[start:]).hexdigest()}
    return Outcome(Task(task, Path(), None, [], {}), job.id, "succeeded", None, None, digests, manifest)


@pytest.fixture
def pair(database, objects):
    return finished(database, objects), finished(database, objects)


def test_nothing_is_held_against_a_clean_run(system, pair):
    assert judge(system, [pair[0]], [pair[1]]).problems == []


def test_a_job_without_a_record_is_lost(system, database, pair):
    with database.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == pair[0].job_id))
    assert judge(system, [pair[0]], [pair[1]]).lost == [f"job {pair[0].job_id} has no record"]


def test_a_job_that_goes_on_for_ever_is_lost(system, database, pair):
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == pair[0].job_id).values(status="running"))
    assert judge(system, [replace(pair[0], status="running")], [pair[1]]).lost


def test_a_record_that_nobody_was_promised_is_a_duplicate(system, database, pair):
    make(database)
    assert judge(system, [pair[0]], [pair[1]]).duplicated


def test_files_of_two_attempts_are_no_duplicates_after_they_are_swept(system, objects, pair):
    objects.put_bytes(result_key(pair[0].job_id, 7, "variance.safetensors"), b"late")
    verdict = judge(system, [pair[0]], [pair[1]])
    assert verdict.problems == []
    assert verdict.leftovers == 1


def test_files_of_a_job_that_did_not_succeed_are_duplicates(system, objects, pair):
    objects.put_bytes(result_key("0" * 32, 1, "variance.safetensors"), b"of nobody")
    assert judge(system, [pair[0]], [pair[1]]).duplicated


@pytest.mark.parametrize("change", [lambda file: file[:-1], lambda file: file[:-1] + b"x"])
def test_a_file_cut_short_or_changed_is_torn(system, objects, pair, change):
    key = result_key(pair[0].job_id, 1, "variance.safetensors")
    objects.put_bytes(key, change(objects.get_bytes(key)))
    assert judge(system, [pair[0]], [pair[1]]).torn


def test_other_bits_and_other_manifests_are_unequal(system, pair):
    assert judge(system, [replace(pair[0], digests={"variance/0.weight": "0"})], [pair[1]]).unequal
    other = pair[0].manifest.model_copy(update={"loss": 0.25})
    assert judge(system, [replace(pair[0], manifest=other)], [pair[1]]).unequal


def test_a_failure_that_is_not_the_tasks_own_is_told(system, pair):
    crashed = replace(pair[0], status="failed", code="worker_crashed", manifest=None)
    assert judge(system, [crashed], [pair[1]]).failed
    refused = replace(pair[0].task, refusal="no_parameters")
    assert judge(system, [replace(pair[0], task=refused)], [pair[1]]).failed
