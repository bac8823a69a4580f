"""Jobs: submitted, found again, waited for, followed, cancelled."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from tests.integration.cases import LONG, long_running, small
from tests.integration.serving import wait_for

from curvature_client import Client, ConflictError, JobCancelled, NotFoundError, WaitTimeout


@pytest.fixture
def long_job(client):
    """A job that runs for minutes unless it is stopped."""
    model, batch = long_running()
    job = client.submit(model, batch, LONG["extensions"], loss=LONG["loss"])
    wait_for(lambda: job.refresh().progress and job.progress.phase == "computing", 60, "the job to compute")
    yield job
    if not job.refresh().done:
        job.cancel().wait(30)


def test_a_job_is_found_again_from_anywhere(client, server):
    model, batch = small()
    job = client.submit(model, batch, ["variance"], priority=7, metadata={"run": "a"})
    with Client(server.url) as another:
        found = another.jobs.get(job.id)
        result = found.result()
    assert found.status == "succeeded"
    assert found.done
    assert found.error is None
    assert (found.priority, found.metadata, found.attempt) == (7, {"run": "a"}, 1)
    assert found.request["extensions"][0]["name"] == "variance"
    assert found.created_at <= found.started_at <= found.finished_at
    assert found.warnings == result.warnings
    assert job.wait() is job
    assert job.status == "succeeded"


def test_jobs_are_listed_newest_first_and_by_state(client):
    model, batch = small()
    submitted = [client.submit(model, batch, ["grad"], seed=s) for s in range(3)]
    for job in submitted:
        job.wait()
    listed = client.jobs.list(status="succeeded", limit=3)
    assert [job.id for job in listed] == [job.id for job in reversed(submitted)]
    everything = [job.id for job in client.jobs.list()]
    assert len(everything) == len(set(everything)) >= 3


def test_a_wait_that_ends_too_early_leaves_the_job_running(long_job):
    begun = time.monotonic()
    with pytest.raises(WaitTimeout, match="still running; it goes on") as caught:
        long_job.wait(timeout=0.5)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.job_id == long_job.id
    assert 0.5 <= time.monotonic() - begun < 5
    assert long_job.refresh().status == "running"


def test_cancelling_stops_a_running_computation_within_two_seconds(long_job, client):
    begun = time.monotonic()
    assert long_job.cancel().status == "cancelling"
    assert long_job.wait(30).status == "cancelled"
    assert time.monotonic() - begun < 2.0
    with pytest.raises(JobCancelled, match="was cancelled; submit it again") as caught:
        long_job.result()
    assert caught.value.job_id == long_job.id
    model, batch = small()
    assert client.analyze(model, batch, ["grad"]).loss > 0


def test_a_queued_job_is_cancelled_at_once(long_job, client):
    model, batch = small()
    waiting = client.submit(model, batch, ["grad"], cache=False)
    assert waiting.status == "queued"
    assert waiting.cancel().status == "cancelled"
    assert [event.status.value for event in waiting.events()][-1] == "cancelled"


def test_a_finished_job_cannot_be_cancelled(client):
    model, batch = small()
    job = client.submit(model, batch, ["grad"]).wait()
    with pytest.raises(ConflictError, match="has succeeded already"):
        job.cancel()


def test_a_result_asked_for_before_it_is_there(long_job, client):
    with pytest.raises(ConflictError, match="is running") as caught:
        client._transport.request("GET", f"/v1/jobs/{long_job.id}/result")
    assert caught.value.code == "result_not_ready"


def test_a_job_id_that_does_not_exist(client):
    with pytest.raises(NotFoundError, match="there is no job 'no such job'") as caught:
        client.jobs.get("no such job")
    assert caught.value.code == "job_not_found"


def test_events_tell_the_whole_story(client):
    model, batch = small()
    job = client.submit(model, batch, [{"name": "diag_ggn_mc", "options": {"mc_samples": 2000}}])
    events = list(job.events())
    states = [event.status.value for event in events if event.event == "state"]
    assert states[-1] == "succeeded"
    assert states == sorted(states, key=["queued", "running", "succeeded"].index)
    columns = [event.progress.done for event in events if event.progress and event.progress.phase == "computing"]
    assert columns == sorted(columns)
    assert events[-1].job_id == job.id


def test_no_state_is_told_twice_however_often_the_connection_is_made(long_job, client, monkeypatch):
    monkeypatch.setattr("curvature_client._jobs.POLL_SECONDS", 0.2)
    model, batch = small()
    waiting = client.submit(model, batch, ["grad"], cache=False)
    seen = []
    follower = threading.Thread(target=lambda: seen.extend(waiting.events()))
    follower.start()
    wait_for(lambda: seen, 30, "the first event")
    follower.join(1.0)
    long_job.cancel()
    follower.join(30)
    states = [event.status.value for event in seen if event.event == "state"]
    assert states == ["queued", "running", "succeeded"]


def test_events_end_when_the_job_is_cancelled(long_job):
    seen = []
    follower = threading.Thread(target=lambda: seen.extend(long_job.events()))
    follower.start()
    wait_for(lambda: any(event.event == "progress" for event in seen), 30, "progress")
    long_job.cancel()
    follower.join(20)
    assert not follower.is_alive()
    assert seen[-1].status.value == "cancelled"


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
from tests.integration.cases import LONG, long_running
from curvature_client import Client
client = Client(sys.argv[1])
model, batch = long_running()
model.eval()
job = client.submit(model, batch, **LONG)
print(job.id, flush=True)
if sys.argv[2] == "wait":
    job.wait()
job.cancel().wait()
client.analyze(model, batch, LONG["extensions"], loss=LONG["loss"], metadata={"from": job.id})
"""


@pytest.fixture
def started(server):
    """Starts the program; whatever happens, it does not outlive the test."""
    processes = []

    def start(where):
        command = [sys.executable, "-c", PROGRAM, server.url, where]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("where", ["analyze", "wait"])
def test_an_interrupt_cancels_in_analyze_and_not_in_wait(client, started, where):
    process = started(where)
    first = process.stdout.readline().strip()

    def running():
        jobs = client.jobs.list(status="running", limit=5)
        wanted = [j for j in jobs if (j.id == first if where == "wait" else j.metadata.get("from") == first)]
        return wanted[0] if wanted else None

    job = wait_for(running, 60, "the job to run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    if where == "analyze":
        assert job.wait(30).status == "cancelled"
    else:
        assert job.refresh().status == "running"
        job.cancel().wait(30)
