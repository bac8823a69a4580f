"""Deleting and pinning over HTTP, limits, and `curvature admin gc`."""

import hashlib
import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from tests.service.planting import BATCH, MODEL, claim, expect_problem, request_body, sha256, submit, succeed, upload
from typer.testing import CliRunner

from curvature_client import Client, ConflictError, NotFoundError
from curvature_client.command import app as curvature
from curvature_protocol.jobs import Job
from curvature_protocol.names import admitted_key, artefact_key
from curvature_service.admin.command import app
from curvature_service.retention.collector import collect_once
from curvature_service.retention.service import clear_files
from curvature_state import keys
from curvature_state.endings import request_cancel
from curvature_state.tables import ArtefactRow, JobRow

pytestmark = pytest.mark.integration

MODEL_PATH = f"/v1/models/{sha256(MODEL)}"


def age(server, table, days, **of):
    moment = datetime.now(UTC) - timedelta(days=days)
    columns = {"finished_at": moment} if table is JobRow else {"created_at": moment}
    with server.resources.database.write() as session:
        session.execute(update(table).filter_by(**of).values(used_at=moment, **columns))


def used_at(server, job):
    with server.resources.database.read() as session:
        return session.get(JobRow, job.id).used_at


def stored_results(server):
    return [name for name in server.stored() if name.startswith("results/")]


# Jobs


def test_a_deleted_job_is_gone_with_its_files(server):
    job = submit(server.client)
    succeed(server, job)
    assert stored_results(server)
    reply = server.client.delete(f"/v1/jobs/{job.id}")
    assert (reply.status_code, reply.content) == (204, b"")
    expect_problem(server.client.get(f"/v1/jobs/{job.id}"), 404, "job_not_found", "job_id")
    expect_problem(server.client.delete(f"/v1/jobs/{job.id}"), 404, "job_not_found", "job_id")
    assert stored_results(server) == []


def test_a_job_that_is_not_over_stays(server):
    job = submit(server.client)
    problem = expect_problem(server.client.delete(f"/v1/jobs/{job.id}"), 409, "job_not_finished", "job_id")
    assert "cancel" in problem["remedy"]
    server.client.post(f"/v1/jobs/{job.id}/cancel")
    assert server.client.delete(f"/v1/jobs/{job.id}").status_code == 204


def test_a_pinned_job_is_deleted_only_after_it_was_unpinned(server):
    job = submit(server.client)
    succeed(server, job)
    path = f"/v1/jobs/{job.id}"
    assert server.client.put(f"{path}/pin").json()["pinned"] is True
    assert server.client.put(f"{path}/pin").json()["pinned"] is True
    assert expect_problem(server.client.delete(path), 409, "in_use", "job_id")["remedy"].startswith("DELETE")
    assert server.client.delete(f"{path}/pin").json()["pinned"] is False
    assert server.client.delete(path).status_code == 204


def test_a_deleted_jobs_idempotency_key_makes_a_new_one(server):
    body, key = request_body(server.client), {"Idempotency-Key": "k"}
    first = server.client.post("/v1/jobs", json=body, headers=key).json()
    server.client.post(f"/v1/jobs/{first['id']}/cancel")
    server.client.delete(f"/v1/jobs/{first['id']}")
    assert server.client.post("/v1/jobs", json=body, headers=key).json()["id"] != first["id"]


def test_another_tenants_job_is_not_there(serve):
    server = serve(require_key=True)
    mine, other = (
        {"Authorization": f"Bearer {keys.create_key(server.resources.database, name, name)[1]}"}
        for name in ("one", "two")
    )
    for kind, data in (("models", MODEL), ("batches", BATCH)):
        server.client.put(f"/v1/{kind}/{sha256(data)}", content=data, headers=mine)
    body = {"model": sha256(MODEL), "batch": {"sha256": sha256(BATCH)}, "extensions": ["variance"], "loss": "mse"}
    job = server.client.post("/v1/jobs", json=body, headers=mine).json()
    path = f"/v1/jobs/{job['id']}"
    server.client.post(f"{path}/cancel", headers=mine)
    expect_problem(server.client.delete(path, headers=other), 404, "job_not_found", "job_id")
    expect_problem(server.client.put(f"{path}/pin", headers=other), 404, "job_not_found", "job_id")
    problem = expect_problem(server.client.delete(MODEL_PATH, headers=other), 409, "in_use", "model")
    assert job["id"] not in json.dumps(problem)
    assert server.client.delete(MODEL_PATH, headers=mine).status_code == 204


def test_reading_a_result_is_a_use(server):
    job = submit(server.client)
    succeed(server, job)
    age(server, JobRow, 1, id=job.id)
    before = used_at(server, job)
    server.client.get(f"/v1/jobs/{job.id}")
    assert used_at(server, job) == before
    server.client.get(f"/v1/jobs/{job.id}/result/variance.safetensors")
    assert used_at(server, job) > before


# Uploads


def test_a_deleted_upload_is_gone_and_can_come_back(server):
    upload(server.client)
    server.resources.objects.put_bytes(admitted_key(sha256(MODEL), "1"), b"admitted")
    assert server.client.delete(MODEL_PATH).status_code == 204
    assert server.stored() == []
    expect_problem(server.client.get(MODEL_PATH), 404, "model_not_found", "model")
    expect_problem(server.client.delete(MODEL_PATH), 404, "model_not_found", "model")
    assert server.client.put(MODEL_PATH, content=MODEL).status_code == 201
    assert server.client.get(f"{MODEL_PATH}/content").content == MODEL


def test_what_a_job_needs_is_not_deleted(server):
    job = submit(server.client)
    problem = expect_problem(server.client.delete(MODEL_PATH), 409, "in_use", "model")
    assert job.id in problem["detail"]
    expect_problem(server.client.delete(f"/v1/batches/{sha256(BATCH)}"), 409, "in_use", "batch")
    request_cancel(server.resources.database, job.id)
    assert server.client.delete(MODEL_PATH).status_code == 204


def test_a_model_that_is_being_inspected_is_not_deleted(server):
    upload(server.client)
    inspected = server.client.get(MODEL_PATH, params={"wait": 0}).json()
    problem = expect_problem(server.client.delete(MODEL_PATH), 409, "in_use", "model")
    assert inspected["inspection_job"] in problem["detail"]


def test_a_pinned_upload_stays(server):
    upload(server.client)
    assert server.client.put(f"{MODEL_PATH}/pin").json()["pinned"] is True
    expect_problem(server.client.delete(MODEL_PATH), 409, "in_use", "model")
    assert server.client.delete(f"{MODEL_PATH}/pin").json()["pinned"] is False
    assert server.client.delete(MODEL_PATH).status_code == 204
    expect_problem(server.client.put(f"{MODEL_PATH}/pin"), 404, "model_not_found", "model")


def test_a_job_whose_upload_is_gone_is_not_retried(server):
    job = submit(server.client)
    server.client.post(f"/v1/jobs/{job.id}/cancel")
    server.client.delete(MODEL_PATH)
    expect_problem(server.client.post(f"/v1/jobs/{job.id}/retry"), 404, "model_not_found", "model")
    upload(server.client)
    assert server.client.post(f"/v1/jobs/{job.id}/retry").json()["status"] == "queued"


def test_an_upload_that_is_sent_again_counts_as_used(serve):
    server = serve(keep_uploads_days=30)
    upload(server.client)
    upload(server.client, "batches", BATCH)
    for kind in ("models", "batches"):
        age(server, ArtefactRow, 31, kind=kind)
    upload(server.client)
    collect_once(server.resources)
    assert server.stored() == [artefact_key("models", sha256(MODEL))]


# Limits


def test_without_limits_nothing_goes(server):
    succeed(server, submit(server.client))
    age(server, JobRow, 1000)
    age(server, ArtefactRow, 1000)
    before = server.stored()
    assert collect_once(server.resources).lines == ()
    assert server.stored() == before


def test_a_removed_result_says_so_and_its_job_stays(serve):
    server = serve(keep_results_days=30)
    job = submit(server.client)
    succeed(server, job)
    age(server, JobRow, 31)
    assert [line.kind for line in collect_once(server.resources).lines] == ["results"]
    path = f"/v1/jobs/{job.id}"
    assert server.client.get(path).json()["status"] == "succeeded"
    for below in ("result", "result/variance.safetensors"):
        problem = expect_problem(server.client.get(f"{path}/{below}"), 404, "result_not_found", "job_id")
        assert "removed" in problem["detail"]


def test_the_limit_on_bytes_spares_what_jobs_need(serve):
    server = serve(max_stored_bytes=1)
    held = submit(server.client)
    claim(server, held)
    spare = upload(server.client, "batches", b"spare")
    age(server, ArtefactRow, 1)
    collect_once(server.resources)
    assert artefact_key("batches", spare) not in server.stored()
    assert artefact_key("models", sha256(MODEL)) in server.stored()


@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_positive(make_settings, value):
    with pytest.raises(ValueError, match="keep_jobs_days"):
        make_settings(keep_jobs_days=value)


# Sweeps


def make_sweep(server):
    body = request_body(server.client)
    base = {name: body[name] for name in ("model", "batch", "extensions", "loss")}
    reply = server.client.post("/v1/sweeps", json={"base": base, "grid": {"seed": [{"value": n} for n in range(3)]}})
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


def test_a_deleted_sweep_is_gone_with_its_jobs_and_their_files(server):
    sweep_id = make_sweep(server)
    rows = server.client.get(f"/v1/sweeps/{sweep_id}/rows").json()["items"]
    expect_problem(server.client.delete(f"/v1/sweeps/{sweep_id}"), 409, "job_not_finished", "sweep_id")
    for row in rows:
        succeed(server, Job.model_validate(server.client.get(f"/v1/jobs/{row['job_id']}").json()))
    assert stored_results(server)
    assert server.client.delete(f"/v1/sweeps/{sweep_id}").status_code == 204
    expect_problem(server.client.get(f"/v1/sweeps/{sweep_id}"), 404, "sweep_not_found", "sweep_id")
    expect_problem(server.client.delete(f"/v1/sweeps/{sweep_id}"), 404, "sweep_not_found", "sweep_id")
    assert server.client.get("/v1/jobs").json()["items"] == []
    clear_files(server.resources)  # as the server does after its answer
    assert stored_results(server) == []


def test_a_sweep_whose_uploads_are_gone_is_not_retried(server):
    sweep_id = make_sweep(server)
    server.client.post(f"/v1/sweeps/{sweep_id}/cancel")
    assert server.client.delete(MODEL_PATH).status_code == 204
    expect_problem(server.client.post(f"/v1/sweeps/{sweep_id}/retry"), 404, "model_not_found", "model")
    assert server.client.get(f"/v1/sweeps/{sweep_id}").json()["counts"] == {"cancelled": 3}
    upload(server.client)
    assert server.client.post(f"/v1/sweeps/{sweep_id}/retry").json()["counts"] == {"queued": 3}


# The client


def test_the_client_deletes_sweeps(server):
    sweep_id = make_sweep(server)
    with Client(server.url) as client:
        sweep = client.sweeps.get(sweep_id)
        with pytest.raises(ConflictError, match="not over"):
            sweep.delete()
        sweep.cancel()
        sweep.delete()
        sweep.delete()
        with pytest.raises(NotFoundError):
            client.sweeps.get(sweep_id)


def test_the_client_pins_and_deletes(server):
    job_id = submit(server.client).id
    with Client(server.url) as client:
        job = client.jobs.get(job_id)
        with pytest.raises(ConflictError, match="not over"):
            job.delete()
        job.cancel()
        assert job.pin().pinned
        with pytest.raises(ConflictError, match="pinned"):
            job.delete()
        assert not job.unpin().pinned
        job.delete()
        job.delete()
        with pytest.raises(NotFoundError):
            client.jobs.get(job_id)


def test_the_command_deletes(server):
    job_id = submit(server.client).id
    server.client.post(f"/v1/jobs/{job_id}/cancel")
    result = CliRunner().invoke(curvature, ["jobs", "delete", job_id, "--url", server.url])
    assert result.stdout == f"deleted {job_id}\n"
    expect_problem(server.client.get(f"/v1/jobs/{job_id}"), 404, "job_not_found", "job_id")


# The command


@pytest.fixture
def gc(server):
    settings = server.resources.settings
    environment = {"CURVATURE_DATABASE_URL": settings.database_url, "CURVATURE_STORAGE_URL": settings.storage_url}

    def run(*words, **changes):
        result = CliRunner().invoke(app, ["gc", *words], env={**environment, **changes})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_gc_tells_what_it_would_remove_and_removes_it(server, gc):
    size = len(succeed(server, submit(server.client)))
    age(server, JobRow, 31)
    before = server.stored()
    limit = {"CURVATURE_KEEP_JOBS_DAYS": "30"}
    dry = gc("--dry-run", **limit)
    assert dry.exit_code == 0
    assert [line.split() for line in dry.stdout.splitlines()][:2] == [
        ["KIND", "COUNT", "BYTES", "WHY"],
        ["jobs", "1", f"{size:,}", "over", "for", "30", "days"],
    ]
    assert server.stored() == before
    wet = gc(**limit)
    assert wet.stdout.splitlines()[:2] == dry.stdout.splitlines()[:2]
    assert wet.stdout.endswith("bytes removed\n")
    assert stored_results(server) == []
    assert "nothing to remove" in gc(**limit).stderr


def test_gc_removes_orphans_only_when_asked_to(server, gc):
    key = artefact_key("models", hashlib.sha256(b"orphan").hexdigest())
    server.resources.objects.put_bytes(key, b"orphan")
    os.utime(server.resources.objects.local_path(key), (time.time() - 2 * 86400,) * 2)
    gc()
    assert server.stored() == [key]
    assert "no record names them" in gc("--orphans").stdout
    assert server.stored() == []


@pytest.mark.parametrize("url", ["file:///nowhere/at/all", "nonsense", ""])
def test_gc_needs_the_store(server, gc, url):
    result = gc(CURVATURE_STORAGE_URL=url)
    assert result.exit_code == 1
    assert "CURVATURE_STORAGE_URL" in result.stderr


def test_gc_does_not_guess_the_store(gc):
    result = gc(CURVATURE_STORAGE_URL=None)
    assert result.exit_code == 1
    assert "set CURVATURE_STORAGE_URL" in result.stderr
