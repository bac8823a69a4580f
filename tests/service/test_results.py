"""Manifests and tensor files."""

import json

import pytest
from tests.service.planting import claim, expect_problem, fail, submit, succeed

from curvature_protocol.results import Manifest
from curvature_state.reconciling import take_back_expired

pytestmark = pytest.mark.integration


@pytest.fixture
def job(client):
    return submit(client)


def file_url(job, label="variance"):
    return f"/v1/jobs/{job.id}/result/{label}.safetensors"


def test_the_manifest_describes_every_tensor(server, job):
    file = succeed(server, job)
    manifest = Manifest.model_validate_json(server.client.get(f"/v1/jobs/{job.id}/result").content)
    (tensor,) = manifest.groups[0].tensors
    assert (tensor.name, tensor.shape, tensor.dtype) == ("0.weight", (1000,), "F64")
    assert tensor.byte_end == len(file)


def test_a_file_reads_back_whole(server, job):
    file = succeed(server, job)
    reply = server.client.get(file_url(job))
    assert reply.content == file
    assert reply.headers["etag"] == f'"{job.id}-1-variance"'


def test_the_manifests_byte_ranges_are_http_ranges(server, job):
    file = succeed(server, job)
    tensor = server.client.get(f"/v1/jobs/{job.id}/result").json()["groups"][0]["tensors"][0]
    wanted = f"bytes={tensor['byte_start']}-{tensor['byte_end'] - 1}"
    reply = server.client.get(file_url(job), headers={"Range": wanted})
    assert reply.status_code == 206
    assert reply.content == file[8 + int.from_bytes(file[:8], "little") :]


def test_head_tells_the_size(server, job):
    file = succeed(server, job)
    reply = server.client.head(file_url(job))
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-length"] == str(len(file))
    assert reply.headers["accept-ranges"] == "bytes"


def test_the_winning_attempt_is_served(server, job):
    held = claim(server, job, lease_seconds=-1)
    server.resources.objects.put_bytes(f"results/{job.id}/{held.attempt}/manifest.json", b"of a loser")
    take_back_expired(server.resources.database)
    file = succeed(server, job)
    assert server.client.get(f"/v1/jobs/{job.id}/result").json()["attempt"] == 2
    assert server.client.get(file_url(job)).content == file


def test_a_label_that_is_not_there_is_told_with_those_that_are(server, job):
    succeed(server, job)
    problem = expect_problem(server.client.get(file_url(job, "kfac")), 404, "result_not_found", "label")
    assert problem["remedy"] == "its labels: variance"


def results_of(client, job):
    return [client.get(f"/v1/jobs/{job.id}/result"), client.get(file_url(job))]


def test_a_result_asked_for_before_it_is_there(client, job):
    for reply in results_of(client, job):
        problem = expect_problem(reply, 409, "result_not_ready", "job_id")
        assert f"job {job.id} is queued" in problem["detail"]
        assert problem["remedy"] == f"wait for it, e.g. on /v1/jobs/{job.id}/events"


def test_the_result_of_a_failed_job_is_its_reason(server, job):
    fail(server, job)
    for reply in results_of(server.client, job):
        problem = expect_problem(reply, 409, "result_not_ready", "job_id")
        assert "empty_batch: the batch has no samples" in problem["detail"]
        assert problem["remedy"] == "send some samples"


def test_the_result_of_a_cancelled_job(client, job):
    client.post(f"/v1/jobs/{job.id}/cancel")
    for reply in results_of(client, job):
        assert "was cancelled" in expect_problem(reply, 409, "result_not_ready", "job_id")["detail"]


def test_a_result_that_was_removed(server, job):
    succeed(server, job)
    server.resources.objects.delete(f"results/{job.id}/1/variance.safetensors")
    expect_problem(server.client.get(file_url(job)), 404, "result_not_found", "job_id")
    server.resources.objects.delete(f"results/{job.id}/1/manifest.json")
    for reply in results_of(server.client, job):
        expect_problem(reply, 404, "result_not_found", "job_id")


def test_a_loss_that_is_not_finite_is_null(server, job):
    succeed(server, job)
    key = f"results/{job.id}/1/manifest.json"
    manifest = json.loads(server.resources.objects.get_bytes(key))
    server.resources.objects.put_bytes(key, json.dumps({**manifest, "loss": None}).encode())
    assert server.client.get(f"/v1/jobs/{job.id}/result").json()["loss"] is None
