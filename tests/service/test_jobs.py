"""Submitting, waiting for, listing and cancelling jobs."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.service.planting import (
    BATCH,
    MODEL,
    claim,
    expect_problem,
    fail,
    request_body,
    sha256,
    submit,
    succeed,
    upload,
)
from tests.state.servers import RedisServer

from curvature_protocol.jobs import Job, JobPage
from curvature_state import events, jobs

pytestmark = pytest.mark.integration

ABSENT = "0" * 64


def inline(data=BATCH):
    return {"data": base64.b64encode(data).decode()}


def bells(redis_server):
    """Ids of the jobs whose bell waits."""
    with redis_server.connect() as connection:
        keys = connection.keys("curvature*")
        messages = [
            json.loads(raw) for key in keys if connection.type(key) == b"list" for raw in connection.lrange(key, 0, -1)
        ]
    return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


def finish_when_rung(server, redis_server, ending=succeed):
    """A thread that ends the first job whose bell rings, as a worker would."""

    def work():
        while not (rung := bells(redis_server)):
            pass
        job = jobs.get_job(server.resources.database, rung[0])
        ending(server, job)
        events.publish(server.resources.redis, events.state_event(jobs.get_job(server.resources.database, job.id)))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


# Submission


def test_a_job_is_queued_and_its_bell_rung(server, redis_server):
    reply = server.client.post("/v1/jobs", json=request_body(server.client, metadata={"run": "7"}, priority=9))
    job = Job.model_validate_json(reply.content)
    assert reply.status_code == 201
    assert (job.status, job.priority, job.metadata, job.attempt) == ("queued", 9, {"run": "7"}, 0)
    assert job.request["extensions"] == [{"name": "variance", "label": None, "options": {}}]
    assert bells(redis_server) == [job.id]


def test_a_model_that_was_never_uploaded(client):
    reply = client.post("/v1/jobs", json=request_body(client, model=ABSENT))
    assert ABSENT in expect_problem(reply, 404, "model_not_found", "model")["detail"]


def test_a_batch_that_was_never_uploaded(client):
    reply = client.post("/v1/jobs", json=request_body(client, batch={"sha256": ABSENT}))
    expect_problem(reply, 404, "batch_not_found", "batch")


def test_a_refused_job_leaves_no_row(client):
    client.post("/v1/jobs", json=request_body(client, extensions=["nonsense"]))
    assert client.get("/v1/jobs").json()["items"] == []


def test_a_job_is_accepted_while_the_broker_is_away_and_soon(serve):
    broker = RedisServer()
    server = serve(redis_url=broker.url)
    body = request_body(server.client)
    started = time.monotonic()
    reply = server.client.post("/v1/jobs", json=body)
    assert (reply.status_code, reply.json()["status"]) == (201, "queued")
    assert time.monotonic() - started < 1.5
    broker.close()


# A batch inside the request


def test_a_batch_inside_is_stored_like_an_upload(client):
    job = submit(client, batch=inline())
    assert job.request["batch"] == {"sha256": sha256(BATCH)}
    assert client.get(f"/v1/batches/{sha256(BATCH)}/content").content == BATCH


def test_a_batch_inside_beyond_the_limit_is_refused(serve):
    client = serve(inline_batch_bytes=1000).client
    assert client.post("/v1/jobs", json=request_body(client, batch=inline(bytes(1000)))).status_code == 201
    reply = client.post("/v1/jobs", json=request_body(client, batch=inline(bytes(1001))))
    assert "/v1/batches" in expect_problem(reply, 413, "payload_too_large", "batch.data")["remedy"]


def test_a_body_announced_too_large_is_refused(client):
    body = b'{"model": "' + b"a" * 8 * 2**20
    reply = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert "/v1/batches" in expect_problem(reply, 413, "payload_too_large")["remedy"]


def test_a_body_streamed_without_end_is_cut_off(client):
    parts = (b" " * 2**20 for _ in range(50))
    reply = client.post("/v1/jobs", content=parts, headers={"Content-Type": "application/json"})
    expect_problem(reply, 413, "payload_too_large")


def test_a_request_large_without_its_batch_is_refused(client):
    reply = client.post("/v1/jobs", json=request_body(client, metadata={"a": "x" * 300_000}))
    expect_problem(reply, 413, "payload_too_large", "metadata")


# Idempotency


def post(client, body, key, **options):
    return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key}, **options)


def test_the_same_key_and_body_give_the_same_job(client, redis_server):
    body = request_body(client)
    first, again = post(client, body, "k"), post(client, body, "k")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert bells(redis_server) == [first.json()["id"]]


def test_the_same_key_with_another_body_is_refused(client):
    first = post(client, request_body(client), "k").json()["id"]
    problem = expect_problem(
        post(client, request_body(client, seed=1), "k"), 409, "idempotency_conflict", "Idempotency-Key"
    )
    assert first in problem["detail"]


def test_a_batch_inside_and_its_hash_are_the_same_body(client):
    first = post(client, request_body(client, batch=inline()), "k")
    assert post(client, request_body(client, batch=inline()), "k").json()["id"] == first.json()["id"]
    assert post(client, request_body(client), "k").json()["id"] == first.json()["id"]


def test_concurrent_twins_make_one_job(client, redis_server):
    body = request_body(client, batch=inline(b"another batch"))
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: post(client, body, "twin"), range(6)))
    assert sorted(reply.status_code for reply in replies) == [200] * 5 + [201]
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len(bells(redis_server)) == 1


def test_what_was_accepted_once_is_found_again_whatever_became_of_its_parts(server):
    body = request_body(server.client)
    first = post(server.client, body, "k")
    server.resources.objects.delete(f"models/{sha256(MODEL)}")
    assert post(server.client, body, "k").json()["id"] == first.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_of_impossible_length_is_refused(client, key):
    expect_problem(post(client, request_body(client), key), 422, "invalid_request", "idempotency-key")


# Waiting


def test_waiting_gives_the_finished_job_with_its_small_result_in_one_request(server, redis_server):
    worker = finish_when_rung(server, redis_server)
    body = request_body(server.client, batch=inline())
    job = Job.model_validate_json(server.client.post("/v1/jobs?wait=20", json=body).content)
    worker.join()
    assert job.status == "succeeded"
    assert job.warnings == ("said by the worker",)
    file = server.client.get(f"/v1/jobs/{job.id}/result/variance.safetensors").content
    assert base64.b64decode(job.result.files["variance"]) == file
    assert job.result.manifest.groups[0].file_bytes == len(file)


def test_a_large_result_does_not_come_inside(serve, redis_server):
    server = serve(inline_result_bytes=100)
    worker = finish_when_rung(server, redis_server)
    reply = server.client.post("/v1/jobs?wait=20", json=request_body(server.client))
    worker.join()
    assert (reply.json()["status"], reply.json()["result"]) == ("succeeded", None)


def test_waiting_tells_of_a_failure(server, redis_server):
    worker = finish_when_rung(server, redis_server, fail)
    job = Job.model_validate_json(server.client.post("/v1/jobs?wait=20", json=request_body(server.client)).content)
    worker.join()
    assert (job.status, job.error.code, job.error.param) == ("failed", "empty_batch", "batch")


def test_waiting_ends_with_the_time_given(client):
    reply = client.post("/v1/jobs?wait=0.2", json=request_body(client))
    assert (reply.status_code, reply.json()["status"]) == (201, "queued")


def test_waiting_has_a_longest_time(serve):
    client = serve(max_wait_seconds=0.2).client
    assert client.post("/v1/jobs?wait=inf", json=request_body(client)).json()["status"] == "queued"


def test_waiting_needs_no_broker(serve, redis_server):
    broker = RedisServer()
    server = serve(redis_url=broker.url)
    job = submit(server.client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.get, f"/v1/jobs/{job.id}?wait=20")
        succeed(server, job)
        assert waiting.result().json()["status"] == "succeeded"
    broker.close()


def test_a_repeated_request_waits_for_the_job_it_made_before(server):
    body = request_body(server.client)
    job = Job.model_validate_json(post(server.client, body, "k").content)
    succeed(server, job)
    reply = post(server.client, body, "k", params={"wait": 5})
    assert reply.status_code == 200
    assert reply.json()["result"]["files"]


def test_a_result_removed_meanwhile_does_not_hide_the_job(server):
    body = request_body(server.client)
    job = Job.model_validate_json(post(server.client, body, "k").content)
    succeed(server, job)
    server.resources.objects.delete(f"results/{job.id}/1/variance.safetensors")
    reply = post(server.client, body, "k", params={"wait": 5})
    assert (reply.status_code, reply.json()["status"], reply.json()["result"]) == (200, "succeeded", None)


@pytest.mark.parametrize("wait", ["-1", "soon", "nan"])
def test_a_time_that_is_none(client, wait):
    expect_problem(client.post(f"/v1/jobs?wait={wait}", json=request_body(client)), 422, "invalid_request", "wait")


# One job, and lists


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", "%00", "x" * 1000])
def test_a_job_that_does_not_exist(client, job_id):
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/result", f"/v1/jobs/{job_id}/events"):
        problem = expect_problem(client.get(path), 404, "job_not_found", "job_id")
        assert problem["remedy"] == "GET /v1/jobs lists the jobs"


def test_lists_page_newest_first_and_filter(server):
    made = [submit(server.client).id for _ in range(5)]
    claim(server, jobs.get_job(server.resources.database, made[0]))
    seen, cursor = [], {}
    while cursor is not None:
        page = JobPage.model_validate_json(
            server.client.get("/v1/jobs", params={"limit": 2, "status": "queued", **cursor}).content
        )
        assert len(page.items) <= 2
        seen += [job.id for job in page.items]
        cursor = {"cursor": page.next_cursor} if page.next_cursor else None
    assert seen == made[:0:-1]


def test_a_job_made_meanwhile_does_not_disturb_the_pages(client):
    made = [submit(client).id for _ in range(4)]
    first = client.get("/v1/jobs?limit=2").json()
    submit(client)
    second = client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["items"] + second["items"]] == made[::-1]


def encoded(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "nonsense",
        "é",
        "a" * 5000,
        encoded([1, 2]),
        encoded({}),
        encoded(None),
        encoded(["2026-01-01T00:00:00+00:00"]),
        encoded(["2026-01-01T00:00:00+00:00", "x\u0000"]),
        encoded(["0001-01-01T00:00:00+14:00", "0" * 32]),
    ],
)
def test_a_cursor_that_this_server_did_not_make(client, cursor):
    expect_problem(client.get("/v1/jobs", params={"cursor": cursor}), 422, "invalid_request", "cursor")


# Cancelling, in each state


def cancel(client, job):
    return client.post(f"/v1/jobs/{job.id}/cancel")


def test_a_queued_job_is_cancelled_at_once(client):
    job = submit(client)
    assert cancel(client, job).json()["status"] == "cancelled"
    assert client.get(f"/v1/jobs/{job.id}").json()["status"] == "cancelled"


def test_a_running_job_is_asked_to_stop(server):
    job = submit(server.client)
    claim(server, job)
    assert cancel(server.client, job).json()["status"] == "cancelling"
    assert cancel(server.client, job).json()["status"] == "cancelling"


def test_cancelling_twice_is_no_error(client):
    job = submit(client)
    cancel(client, job)
    assert cancel(client, job).json()["status"] == "cancelled"


@pytest.mark.parametrize(("ending", "word"), [(succeed, "succeeded"), (fail, "failed")])
def test_a_finished_job_cannot_be_cancelled(server, ending, word):
    job = submit(server.client)
    ending(server, job)
    assert word in expect_problem(cancel(server.client, job), 409, "job_finished", "job_id")["detail"]


def test_cancelling_a_job_that_does_not_exist(client):
    expect_problem(client.post("/v1/jobs/nonsense/cancel"), 404, "job_not_found", "job_id")


def test_a_waiting_request_hears_of_a_cancellation(client):
    job = submit(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, f"/v1/jobs/{job.id}?wait=20")
        cancel(client, job)
        assert waiting.result().json()["status"] == "cancelled"


def test_a_model_and_batch_are_known_by_hash_only(client):
    upload(client, "models", BATCH)
    reply = client.post("/v1/jobs", json=request_body(client, model=sha256(BATCH)))
    assert reply.status_code == 201


def test_a_loss_function_and_further_batches_must_be_there(client):
    dot = {"name": "batch_dot", "options": {"against": {"sha256": ABSENT}}}
    body = request_body(client)
    lacking = {**body, "loss": {"sha256": ABSENT}}
    expect_problem(client.post("/v1/jobs", json=lacking), 404, "loss_not_found", "loss")
    lacking = {**body, "extensions": ["grad", dot]}
    reply = client.post("/v1/jobs", json=lacking)
    expect_problem(reply, 404, "batch_not_found", "extensions.1.options.against")
    dot["options"]["against"]["sha256"] = sha256(BATCH)
    found = {**body, "extensions": [dot], "loss": {"sha256": upload(client, "losses", MODEL), "output": 1}}
    reply = client.post("/v1/jobs", json=found)
    assert reply.status_code == 201
    assert reply.json()["request"]["loss"] == {"sha256": sha256(MODEL), "output": 1}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"loss": {"sha256": "0"}}, "invalid_request", "loss.sha256"),
        ({"loss": {"name": "custom"}}, "unknown_loss", "loss.name"),
        (
            {"extensions": [{"name": "batch_dot", "options": {"against": {"sha256": "0"}}}]},
            "invalid_option",
            "extensions.0.options.against.sha256",
        ),
        (
            {"extensions": [{"name": "grad", "options": {"against": {"sha256": ABSENT}}}]},
            "invalid_option",
            "extensions.0.options",
        ),
    ],
)
def test_references_of_another_form_are_refused(client, change, code, param):
    expect_problem(client.post("/v1/jobs", json=request_body(client, **change)), 422, code, param)
