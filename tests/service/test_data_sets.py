"""Jobs over data sets, as the API takes them; workers' parts are played by hand."""

import pytest
from tests.service.planting import build_manifest, expect_problem, request_body, safetensors_file, upload
from tests.state.holders import hold

from curvature_protocol.jobs import Job, JobKind
from curvature_protocol.names import result_key
from curvature_state import endings, jobs
from curvature_state.jobs import problem
from curvature_state.shards import list_shards

pytestmark = pytest.mark.integration


@pytest.fixture
def body(client):
    """A job over a data set of three parts."""
    parts = [{"sha256": upload(client, "batches", bytes([n])), "samples": n + 1} for n in range(3)]
    return request_body(client, batch={"parts": parts})


def submit(client, body):
    reply = client.post("/v1/jobs", json=body)
    assert reply.status_code == 201, reply.text
    return Job.model_validate_json(reply.content)


def look(client, job):
    return Job.model_validate_json(client.get(f"/v1/jobs/{job.id}").content)


def shards_of(server, job):
    return list_shards(server.resources.database, job.id)


def test_a_job_over_a_data_set_waits_for_one_shard_per_part(server, client, body):
    job = submit(client, body)
    assert (job.status, job.parts, job.progress.phase, job.progress.total) == ("waiting", 3, "shards", 3)
    requests = [jobs.get_job(server.resources.database, shard.id).request for shard in shards_of(server, job)]
    assert [request["part"] for request in requests] == [
        {"index": 0, "first_sample": 0, "samples": 1},
        {"index": 1, "first_sample": 1, "samples": 2},
        {"index": 2, "first_sample": 3, "samples": 3},
    ]
    assert [request["batch"]["sha256"] for request in requests] == [part["sha256"] for part in body["batch"]["parts"]]


def test_shards_are_listed_only_where_they_are_asked_for(client, body):
    job = submit(client, body)
    assert [item["id"] for item in client.get("/v1/jobs").json()["items"]] == [job.id]
    shards = client.get("/v1/jobs", params={"kind": JobKind.SHARD}).json()["items"]
    assert {shard["parent"] for shard in shards} == {job.id}


def test_it_is_queued_for_merging_when_the_last_shard_has_succeeded(server, client, body):
    job = submit(client, body)
    for done, shard in enumerate(shards_of(server, job)):
        assert (look(client, job).status, look(client, job).progress.done) == ("waiting", done)
        held = hold(server.resources.database, shard.id)
        endings.succeed(server.resources.database, shard.id, held.attempt)
    assert look(client, job).status == "queued"


def test_a_part_that_fails_fails_the_job_and_is_retried_alone(server, client, body):
    job = submit(client, body)
    first, second, _ = shards_of(server, job)
    database = server.resources.database
    endings.succeed(database, first.id, hold(database, first.id).attempt)
    endings.fail(database, second.id, hold(database, second.id).attempt, problem("invalid_targets", "no such class"))
    failed = look(client, job)
    assert (failed.status, failed.error.code) == ("failed", "invalid_targets")
    assert "part 1 of 3" in failed.error.detail
    again = Job.model_validate_json(client.post(f"/v1/jobs/{job.id}/retry").content)
    assert (again.status, again.progress.done) == ("waiting", 1)
    assert [shard.status for shard in shards_of(server, job)] == ["succeeded", "queued", "queued"]


def test_only_what_failed_or_was_cancelled_is_retried(server, client, body):
    job = submit(client, body)
    expect_problem(client.post(f"/v1/jobs/{job.id}/retry"), 409, "job_not_finished", "job_id")
    client.post(f"/v1/jobs/{job.id}/cancel")
    assert client.post(f"/v1/jobs/{job.id}/retry").json()["status"] == "waiting"
    expect_problem(client.post(f"/v1/jobs/{'0' * 32}/retry"), 404, "job_not_found", "job_id")


def test_cancelling_cancels_the_shards(server, client, body):
    job = submit(client, body)
    assert client.post(f"/v1/jobs/{job.id}/cancel").json()["status"] == "cancelled"
    assert {shard.status for shard in shards_of(server, job)} == {"cancelled"}


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"name": "batch_dot"}, "extensions.0.name"),
        ({"name": "kfra"}, "extensions.0.name"),
        ({"name": "variance", "options": {"subsampling": [0, 1]}}, "extensions.0.options.subsampling"),
    ],
)
def test_what_needs_the_whole_batch_is_refused_with_the_reason(client, body, extension, param):
    reply = client.post("/v1/jobs", json={**body, "extensions": [extension]})
    assert expect_problem(reply, 422, "whole_batch_required", param)["remedy"]


def test_a_part_that_was_never_uploaded_is_named(client, body):
    body["batch"]["parts"][1]["sha256"] = "0" * 64
    expect_problem(client.post("/v1/jobs", json=body), 404, "batch_not_found", "batch.parts.1")


def test_a_file_kept_in_parts_is_not_one_file(server, client, body):
    job = submit(client, body)
    database, objects = server.resources.database, server.resources.objects
    for shard in shards_of(server, job):
        endings.succeed(database, shard.id, hold(database, shard.id).attempt)
    held = hold(database, job.id)
    file, start = safetensors_file([0.0])
    manifest = build_manifest(job.id, held.attempt, "variance", start, len(file))
    group = manifest.groups[0].model_copy(update={"file_bytes": 0})
    manifest = manifest.model_copy(update={"groups": (group,)})
    objects.put_bytes(result_key(job.id, held.attempt, "manifest.json"), manifest.model_dump_json().encode())
    endings.succeed(database, job.id, held.attempt)
    reply = client.get(f"/v1/jobs/{job.id}/result/variance.safetensors")
    assert "parts" in expect_problem(reply, 404, "result_not_found", "label")["remedy"]
