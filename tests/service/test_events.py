"""Server-sent events: live, resumable, and there when Redis is not."""

from datetime import UTC, datetime

import pytest
from httpx_sse import connect_sse
from tests.service.planting import claim, expect_problem, fail, submit, succeed, upload
from tests.state.servers import RedisServer

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import JobStatus, Progress
from curvature_state import endings, events, jobs
from curvature_state.shards import list_shards

pytestmark = pytest.mark.integration


@pytest.fixture
def job(client):
    return submit(client)


def follow(client, job, after=None):
    headers = {} if after is None else {"Last-Event-ID": after}
    with connect_sse(client, "GET", f"/v1/jobs/{job.id}/events", headers=headers) as source:
        for sent in source.iter_sse():
            if not sent.data:
                continue  # a sign of life
            event = JobEvent.model_validate_json(sent.data)
            assert sent.event == event.event
            yield sent.id, event


def publish_state(server, job):
    events.publish(server.resources.redis, events.state_event(jobs.get_job(server.resources.database, job.id)))


def publish_progress(server, job, done):
    progress = Progress(phase="computing", done=done, total=9)
    event = JobEvent(
        event="progress",
        job_id=job.id,
        status=JobStatus.RUNNING,
        at=datetime.now(UTC),
        attempt=1,
        progress=progress,
    )
    events.publish(server.resources.redis, event)


def test_states_and_progress_come_as_they_happen(server, job):
    stream = follow(server.client, job)
    assert next(stream)[1].status == "queued"
    held = claim(server, job)
    publish_state(server, job)
    assert next(stream)[1].status == "running"
    publish_progress(server, job, 3)
    event = next(stream)[1]
    assert (event.event, event.progress.done) == ("progress", 3)
    endings.succeed(server.resources.database, job.id, held.attempt)
    publish_state(server, job)
    assert [event.status for _, event in stream] == ["succeeded"]


def test_of_a_data_set_every_shard_that_is_there_is_told(server):
    parts = [{"sha256": upload(server.client, "batches", f"part {n}".encode()), "samples": 4} for n in range(3)]
    job = submit(server.client, batch={"parts": parts}, extensions=["variance"])
    stream = follow(server.client, job)
    assert next(stream)[1].progress == Progress(phase="shards", done=0, total=3)
    for done, shard in enumerate(list_shards(server.resources.database, job.id)[:2], 1):
        held = claim(server, shard)
        ending = endings.succeed(server.resources.database, shard.id, held.attempt)
        events.publish_all(server.resources.redis, ending.others)
        assert next(stream)[1].progress == Progress(phase="shards", done=done, total=3)
    stream.close()


def test_a_reader_resumes_where_it_was(server, job):
    claim(server, job)
    for done in range(3):
        publish_progress(server, job, done)
    stream = follow(server.client, job)
    seen = [next(stream) for _ in range(3)]
    stream.close()
    resumed = follow(server.client, job, after=seen[-1][0])
    assert next(resumed)[1].progress.done == 2
    resumed.close()


def test_a_reader_who_resumes_is_not_told_the_state_it_knows(server, job):
    claim(server, job)
    publish_state(server, job)
    publish_progress(server, job, 1)
    stream = follow(server.client, job)
    last = next(event_id for event_id, event in stream if event.event == "progress")
    stream.close()
    with connect_sse(
        server.client, "GET", f"/v1/jobs/{job.id}/events?wait=0.2", headers={"Last-Event-ID": last}
    ) as source:
        assert [sent.data for sent in source.iter_sse() if sent.data] == []


def test_the_last_event_tells_why_a_job_failed(server, job):
    fail(server, job)
    publish_state(server, job)
    last = list(follow(server.client, job))[-1][1]
    assert (last.status, last.error.code, last.error.remedy) == ("failed", "empty_batch", "send some samples")


def test_a_finished_job_without_a_stream_tells_its_end(server, job, redis_server):
    succeed(server, job)
    with redis_server.connect() as connection:
        connection.flushall()
    assert [(event_id, event.status) for event_id, event in follow(server.client, job)] == [("", "succeeded")]


def test_a_reader_that_saw_the_end_and_resumes_is_told_it_again(server, job):
    succeed(server, job)
    publish_state(server, job)
    last_id, last = list(follow(server.client, job))[-1]
    assert [event.status for _, event in follow(server.client, job, after=last_id)] == [last.status]


def test_a_reader_outlasts_the_loss_of_all_events(server, job, redis_server):
    stream = follow(server.client, job)
    assert next(stream)[1].status == "queued"
    with redis_server.connect() as connection:
        connection.flushall()
    held = claim(server, job)  # nothing is published: the database alone knows
    assert next(stream)[1].status == "running"
    endings.succeed(server.resources.database, job.id, held.attempt)
    assert [event.status for _, event in stream] == ["succeeded"]


def test_a_state_told_by_the_database_is_not_told_again_by_the_stream(server, job, redis_server):
    stream = follow(server.client, job)
    next(stream)
    held = claim(server, job)
    assert next(stream)[1].status == "running"
    publish_state(server, job)
    endings.succeed(server.resources.database, job.id, held.attempt)
    publish_state(server, job)
    assert [event.status for _, event in stream] == ["succeeded"]


def test_events_without_any_redis(serve):
    absent = RedisServer()
    server = serve(redis_url=absent.url)
    job = submit(server.client)
    stream = follow(server.client, job)
    assert next(stream)[1].status == "queued"
    succeed(server, job)
    assert [event.status for _, event in stream] == ["succeeded"]
    absent.close()


def test_a_stream_ends_after_the_time_asked_for(client, job):
    reply = client.get(f"/v1/jobs/{job.id}/events", params={"wait": 0.2})
    assert reply.text.count("event: state") == 1
    assert reply.elapsed.total_seconds() < 2


def test_a_stream_of_no_time_tells_what_is_known(client, job):
    assert client.get(f"/v1/jobs/{job.id}/events", params={"wait": 0}).text.count("event: state") == 1


def test_a_stream_ends_in_time_however_much_there_is_to_tell(server, job):
    claim(server, job)
    with server.client.stream("GET", f"/v1/jobs/{job.id}/events", params={"wait": 0.3}) as reply:
        for done, _ in enumerate(reply.iter_lines()):
            publish_progress(server, job, done)


def test_a_quiet_stream_sends_signs_of_life(serve):
    server = serve(heartbeat_seconds=0.1)
    job = submit(server.client)
    with server.client.stream("GET", f"/v1/jobs/{job.id}/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert next(line for line in reply.iter_lines() if line.startswith(": ping"))


def test_the_server_stops_reading_when_the_reader_goes(server, job, redis_server):
    stream = follow(server.client, job)
    next(stream)
    with redis_server.connect() as connection:

        def blocked():
            return connection.info("clients")["blocked_clients"]

        while blocked() == 0:
            pass
        stream.close()
        while blocked() > 0:
            pass


@pytest.mark.parametrize("last", ["nonsense", "1-", "-1", "1-2-3", "9" * 30, "1-" + "9" * 30, "$", ">"])
def test_an_id_that_is_none_of_ours(client, job, last):
    reply = client.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": last})
    expect_problem(reply, 422, "invalid_request", "Last-Event-ID")
