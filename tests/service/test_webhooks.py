"""Messages about what is over, from the running API to real receivers; on SQLite and on PostgreSQL."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from datetime import datetime

import pytest
from sqlalchemy import delete, select, text, update
from tests.service.planting import expect_problem, fail, request_body, submit, succeed
from tests.service.receiver import Receiver, answer
from tests.service.server import LiveServer
from tests.state.test_webhooks import come_due, make_job, make_sweep, row_of, set_status, take_one

from curvature_protocol.jobs import Job, JobStatus
from curvature_protocol.requests import Webhook
from curvature_protocol.sweeps import Sweep
from curvature_service.webhooks.addresses import read_policy
from curvature_service.webhooks.deliverer import deliver
from curvature_service.webhooks.sender import Sender
from curvature_state import Database, migrate, webhooks
from curvature_state.database import make_engine
from curvature_state.jobs import get_job
from curvature_state.tables import Base, JobRow, SweepRow, WebhookRow

pytestmark = pytest.mark.integration

SECRET = "the-secret-of-the-request"
ALLOWED = {"webhook_allowed_hosts": "127.0.0.0/8", "webhook_seconds": 0.05}


@pytest.fixture(scope="module")
def postgres_url(postgres):
    url = postgres.url(postgres.create_database())
    migrate(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request, make_settings):
    """Settings of servers that look for due messages all the time, all on one empty database."""
    if request.param == "sqlite":
        return make_settings(**ALLOWED)
    url = request.getfixturevalue("postgres_url")
    engine = make_engine(url, pooled=False)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE " + ", ".join(Base.metadata.tables)))
    return make_settings(**ALLOWED, database_url=url)


@pytest.fixture
def server(settings):
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def database(server):
    return server.resources.database


def hooked(database, receiver, secret=SECRET):
    return make_job(database, webhook=Webhook(url=receiver.url, secret=secret))


def wait_for_state(database, subject_id, state, tries):
    """Until a try's outcome is recorded."""
    while (row := row_of(database, subject_id)).state != state or row.attempts != tries:
        pass
    return row


def wait_for_failure(database, subject_id, tries):
    while (row := row_of(database, subject_id)).attempts != tries or row.last_error is None:
        pass
    return row


def verified(received):
    """The message, if its signature is right: computed here, as the specification says."""
    _, headers, body = received
    told = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.digest(SECRET.encode(), told, hashlib.sha256)
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    return json.loads(body)


# What is told


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_a_jobs_end_is_told(database, status):
    with Receiver() as receiver:
        job_id = hooked(database, receiver)
        set_status(database, job_id, status)
        message = verified(receiver.next())
        wait_for_state(database, job_id, "delivered", 1)
        assert receiver.received.empty()
    job = get_job(database, job_id)
    assert set(message) == {"type", "timestamp", "data"}
    assert message["type"] == f"job.{status}"
    assert datetime.fromisoformat(message["timestamp"]) == job.finished_at
    assert message["data"] == job.model_dump(mode="json", exclude={"request", "result"})
    assert Job.model_validate({**message["data"], "request": {}}).status == status


def test_a_sweeps_end_is_told_once(database):
    with Receiver() as receiver:
        sweep_id, jobs = make_sweep(database)
        with database.write() as session:
            session.execute(update(WebhookRow).values(url=receiver.url, secret=SECRET))
        for job_id, status in zip(jobs, ("succeeded", "failed", "succeeded"), strict=True):
            set_status(database, job_id, status)
        message = verified(receiver.next())
        wait_for_state(database, sweep_id, "delivered", 1)
        assert receiver.received.empty()
    assert message["type"] == "sweep.finished"
    sweep = Sweep.model_validate(message["data"])
    assert (sweep.id, sweep.total, sweep.done) == (sweep_id, 3, True)
    assert sweep.counts == {JobStatus.SUCCEEDED: 2, JobStatus.FAILED: 1}


def test_a_job_that_was_submitted_is_told_of_at_each_of_its_ends(server):
    client = server.client
    with Receiver() as receiver:
        job = submit(client, webhook={"url": receiver.url, "secret": SECRET})
        fail(server, job)
        first = receiver.next()
        assert client.post(f"/v1/jobs/{job.id}/retry").status_code == 200
        succeed(server, job)
        second = receiver.next()
        wait_for_state(server.resources.database, job.id, "delivered", 1)
        assert receiver.received.empty()
    assert verified(first)["data"]["error"]["code"] == "empty_batch"
    assert [verified(message)["type"] for message in (first, second)] == ["job.failed", "job.succeeded"]
    assert first[1]["webhook-id"] != second[1]["webhook-id"]


def test_a_job_that_is_cancelled_in_the_queue_is_told_of(server):
    with Receiver() as receiver:
        job = submit(server.client, webhook={"url": receiver.url, "secret": SECRET})
        assert server.client.post(f"/v1/jobs/{job.id}/cancel").json()["status"] == "cancelled"
        assert verified(receiver.next())["type"] == "job.cancelled"


def post_sweep(client, webhook):
    grid = {"seed": [{"value": seed} for seed in range(3)]}
    return client.post("/v1/sweeps", json={"base": request_body(client), "grid": grid, "webhook": webhook})


def test_a_sweep_that_was_submitted_is_told_of(server):
    with Receiver() as receiver:
        reply = post_sweep(server.client, {"url": receiver.url, "secret": SECRET})
        sweep_id = reply.json()["id"]
        assert server.client.post(f"/v1/sweeps/{sweep_id}/cancel").status_code == 200
        message = verified(receiver.next())
        shown = server.client.get(f"/v1/sweeps/{sweep_id}")
    assert (message["type"], message["data"]) == ("sweep.finished", shown.json())
    assert message["data"]["counts"] == {"cancelled": 3}
    assert SECRET not in reply.text + shown.text


def test_a_private_address_is_refused_at_submission(server):
    webhook = {"url": "http://10.0.0.1/hook"}
    job = server.client.post("/v1/jobs", json=request_body(server.client, webhook=webhook))
    for reply in (job, post_sweep(server.client, webhook)):
        assert "is not public" in expect_problem(reply, 422, "invalid_request", "webhook.url")["detail"]


# Tries


def test_a_message_is_sent_again_until_it_arrives(database):
    with Receiver(answer(500), answer(302, location="/"), answer(200)) as receiver:
        job_id = hooked(database, receiver)
        set_status(database, job_id, "succeeded")
        first = receiver.next()
        assert wait_for_failure(database, job_id, 1).last_error == "it answered 500"
        come_due(database)
        second = receiver.next()
        wait_for_failure(database, job_id, 2)
        come_due(database)
        third = receiver.next()
        wait_for_state(database, job_id, "delivered", 3)
        assert receiver.received.empty()
    assert verified(first) == verified(second) == verified(third)
    assert len({headers["webhook-id"] for _, headers, _ in (first, second, third)}) == 1


def test_a_pause_that_the_receiver_asks_for_is_kept(database):
    with Receiver(answer(503, retry_after="7200")) as receiver:
        job_id = hooked(database, receiver)
        set_status(database, job_id, "succeeded")
        receiver.next()
        row = wait_for_failure(database, job_id, 1)
    assert 7000 < (row.next_at - datetime.now(row.next_at.tzinfo)).total_seconds() <= 7200


def test_after_the_last_try_it_is_given_up(database):
    with Receiver(answer(500)) as receiver:
        job_id = hooked(database, receiver)
        with database.write() as session:
            session.execute(update(WebhookRow).values(attempts=webhooks.MAX_TRIES - 1))
        set_status(database, job_id, "succeeded")
        assert wait_for_state(database, job_id, "failed", webhooks.MAX_TRIES).last_error == "it answered 500"


def test_a_receiver_that_is_gone_is_not_asked_again(database):
    with Receiver(answer(410)) as receiver:
        job_id = hooked(database, receiver)
        set_status(database, job_id, "succeeded")
        assert wait_for_state(database, job_id, "failed", 1).last_error == "it answered 410"


def test_a_message_that_cannot_be_handled_keeps_no_other_from_being_sent(database):
    with Receiver() as receiver:
        broken = hooked(database, receiver)
        with database.write() as session:
            session.execute(update(WebhookRow).values(secret="whsec_!"))
        good = hooked(database, receiver)
        for job_id in (broken, good):
            set_status(database, job_id, "succeeded")
        wait_for_state(database, good, "delivered", 1)
        assert wait_for_failure(database, broken, 1).last_error == "unforeseen: ValueError"


def test_a_name_that_leads_inside_is_refused(settings):
    with LiveServer(settings.model_copy(update={"webhook_allowed_hosts": ""})) as server, Receiver() as receiver:
        database = server.resources.database
        url = receiver.url.replace("127.0.0.1", "localhost")
        job_id = make_job(database, webhook=Webhook(url=url))
        set_status(database, job_id, "succeeded")
        row = wait_for_failure(database, job_id, 1)
        assert receiver.received.empty()
    assert (row.state, row.last_error) == ("due", "localhost has an address that is not public")


# Several servers, and their ends


def test_of_two_servers_one_sends(settings):
    with LiveServer(settings) as one, LiveServer(settings), Receiver() as receiver:
        database = one.resources.database
        jobs = [hooked(database, receiver) for _ in range(40)]
        with database.write() as session:
            session.execute(update(JobRow).values(status="succeeded"))
        for job_id in jobs:
            wait_for_state(database, job_id, "delivered", 1)
        told = [receiver.received.get_nowait() for _ in jobs]
        assert receiver.received.empty()
    assert {verified(message)["data"]["id"] for message in told} == set(jobs)


def test_a_server_that_stops_does_not_wait_for_receivers_and_another_goes_on(settings):
    with Receiver(lambda handler: receiver.released.wait()) as receiver:
        with LiveServer(settings) as first:
            job_id = hooked(first.resources.database, receiver)
            set_status(first.resources.database, job_id, "succeeded")
            before = receiver.next()
        with LiveServer(settings) as second:
            come_due(second.resources.database)  # its holder is silent for long
            after = receiver.next()
            wait_for_state(second.resources.database, job_id, "delivered", 2)
    assert after[1]["webhook-id"] == before[1]["webhook-id"]


# Subjects that change after their message was taken


@pytest.fixture
def quiet(settings):
    """A database without a server that sends by itself."""
    database = Database(settings.database_url)
    yield database
    database.close()


def try_once(database, delivery):
    sender = Sender(read_policy(False, "127.0.0.0/8"), None, timeout_seconds=20)
    asyncio.run(deliver(database, sender, delivery))


def test_of_a_job_that_was_deleted_nobody_is_told(quiet):
    with Receiver() as receiver:
        job_id = hooked(quiet, receiver)
        set_status(quiet, job_id, "succeeded")
        taken = take_one(quiet)
        with quiet.write() as session:
            session.execute(delete(JobRow).where(JobRow.id == job_id))
        try_once(quiet, taken)
        assert receiver.received.empty()
    assert (row_of(quiet, job_id).state, row_of(quiet, job_id).last_error) == ("failed", "the job was deleted")


def test_of_a_sweep_that_was_deleted_nobody_is_told(quiet):
    sweep_id, jobs = make_sweep(quiet, rows=1)
    set_status(quiet, jobs[0], "succeeded")
    taken = take_one(quiet)
    with quiet.write() as session:
        session.execute(delete(SweepRow))
    try_once(quiet, taken)
    assert row_of(quiet, sweep_id).last_error == "the sweep was deleted"


@pytest.mark.parametrize("subject", ["job", "sweep"])
def test_what_was_taken_up_again_meanwhile_is_told_of_at_its_next_end(quiet, subject):
    with Receiver() as receiver:
        if subject == "job":
            subject_id = job_id = hooked(quiet, receiver)
        else:
            subject_id, [job_id] = make_sweep(quiet, rows=1)
            with quiet.write() as session:
                session.execute(update(WebhookRow).values(url=receiver.url))
        set_status(quiet, job_id, "failed")
        taken = take_one(quiet)
        set_status(quiet, job_id, "queued")
        try_once(quiet, taken)
        assert (row_of(quiet, subject_id).state, receiver.received.empty()) == ("waiting", True)
        set_status(quiet, job_id, "succeeded")
        try_once(quiet, take_one(quiet))
        told = json.loads(receiver.next()[2])
    assert told["type"] == ("job.succeeded" if subject == "job" else "sweep.finished")


# Secrets


def test_secrets_are_not_shown_again(server):
    webhook = {"url": "http://127.0.0.1:9/hook", "secret": SECRET}
    reply = server.client.post("/v1/jobs", json=request_body(server.client, webhook=webhook))
    assert reply.status_code == 201
    job_id = reply.json()["id"]
    assert SECRET not in reply.text
    for path in ("/v1/jobs", f"/v1/jobs/{job_id}"):
        assert SECRET not in server.client.get(path).text
    with server.resources.database.read() as session:
        assert SECRET not in json.dumps(session.scalars(select(JobRow.request)).one())


@pytest.mark.parametrize("secret", ["too short", "with a \x00 control character", "whsec_no-base64-at-all"])
def test_a_secret_that_is_refused_is_not_repeated(server, secret):
    webhook = {"url": "https://receiver.example/hook", "secret": secret}
    reply = server.client.post("/v1/jobs", json=request_body(server.client, webhook=webhook))
    param = "webhook" if secret.startswith("whsec_") else "webhook.secret"
    problem = expect_problem(reply, 422, "invalid_request", param)
    assert secret not in problem["detail"]


def test_the_log_tells_neither_secrets_nor_urls(database, caplog):
    caplog.set_level(logging.DEBUG, "curvature")
    with Receiver(answer(500)) as receiver:
        job_id = hooked(database, receiver)
        set_status(database, job_id, "succeeded")
        wait_for_failure(database, job_id, 1)
        come_due(database)
        wait_for_state(database, job_id, "delivered", 2)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("curvature")]
    about = [line for line in told if job_id in line]
    assert any("it answered 500; to be tried again" in line for line in about)
    assert not any(SECRET in line or "/hook" in line for line in told)
