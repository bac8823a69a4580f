"""Things die in the middle of a job: what the user sees, and that the next job runs."""

import signal

import pytest
import torch
from tests.integration.cases import LONG, long_running, small
from tests.integration.serving import Server, wait_for
from torch import nn

from curvature_client import Client, InternalServerError, JobFailed


@pytest.fixture
def hurt(own_server):
    with Client(own_server.url) as client:
        yield own_server, client


def start_long_job(client):
    model, batch = long_running()
    job = client.submit(model, batch, **LONG)
    wait_for(lambda: job.refresh().progress and job.progress.phase == "computing", 60, "the job to compute")
    return job


def busiest(processes):
    return max(processes, key=lambda process: sum(process.cpu_times()[:2]))


def test_a_killed_child_costs_its_job_an_attempt(hurt):
    server, client = hurt
    job = start_long_job(client)
    busiest(server.children()).kill()
    wait_for(lambda: job.refresh().attempt == 2 and job.status == "running", 60, "the second attempt")
    job.cancel()
    assert job.wait(30).status == "cancelled"
    model, batch = small()
    assert client.analyze(model, batch, ["grad"], cache=False).loss > 0


def test_a_job_whose_process_dies_every_time_fails_with_the_reason_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CURVATURE_MAX_ATTEMPTS", "1")
    server = Server(tmp_path / "data")
    try:
        with Client(server.url) as client:
            job = start_long_job(client)
            busiest(server.children()).kill()
            with pytest.raises(JobFailed, match=r"was killed by signal 9 \(SIGKILL\)") as caught:
                job.result()
            assert caught.value.code == "worker_crashed"
            assert isinstance(caught.value, InternalServerError)
            assert caught.value.remedy
            model, batch = small()
            assert client.analyze(model, batch, ["grad"]).loss > 0
    finally:
        server.stop()


def test_a_killed_worker_loses_no_job(hurt):
    server, client = hurt
    job = start_long_job(client)
    model, batch = small()
    waiting = client.submit(model, batch, ["grad"])
    worker, children = server.worker(), server.children()
    worker.kill()
    wait_for(lambda: not any(child.is_running() for child in children), 10, "the children to follow")
    again = wait_for(lambda: job.refresh().attempt == 2 and job.status == "running", 60, "the second attempt")
    assert again
    job.cancel()
    assert job.wait(30).status == "cancelled"
    assert waiting.result().loss > 0


def test_the_api_and_the_broker_are_started_again(hurt):
    server, client = hurt
    job = start_long_job(client)
    model, batch = small()
    waiting = client.submit(model, batch, ["grad"])
    for name in ("-m", "curvature_service"), ("--unixsocket",), ("unixsocket:",):
        for process in server.find(*name):
            process.kill()
    job.cancel()
    assert job.wait(60).status == "cancelled"
    assert waiting.wait(60).result().loss > 0


def test_a_second_start_finds_old_results_and_runs_what_was_queued(tmp_path):
    model, batch = small()
    server = Server(tmp_path / "data")
    with Client(server.url) as client:
        old = client.submit(model, batch, ["variance"]).wait()
        running = start_long_job(client)
        queued = client.submit(model, batch, ["grad"])
        everything = server.processes()
        assert server.stop() == 0
    wait_for(lambda: not any(p.is_running() for p in everything), 10, "everything to stop")
    server = Server(tmp_path / "data")
    with Client(server.url) as client:
        assert client.jobs.get(old.id).result()["variance"]["0.weight"].shape == (4, 5)
        job = client.jobs.get(running.id)
        wait_for(lambda: job.refresh().status == "running", 30, "the interrupted job to run again")
        assert job.attempt == 2
        job.cancel().wait(30)
        assert client.jobs.get(queued.id).wait(30).result().loss > 0
    assert server.stop(signal.SIGTERM) == 0


def test_a_killed_supervisor_takes_everything_with_it(tmp_path):
    server = Server(tmp_path / "data")
    everything = server.processes()
    assert len(everything) >= 6
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in everything), 15, "all to end")


def test_running_out_of_memory_fails_the_job_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CURVATURE_MEMORY_LIMIT_BYTES", str(4 * 2**30))
    server = Server(tmp_path / "data")
    wide = nn.Sequential(nn.Linear(1, 40_000), nn.Linear(40_000, 1)).eval()
    try:
        with Client(server.url) as client:
            with pytest.raises(JobFailed, match="memory ran out in the smallest pieces") as caught:
                client.analyze(wide, (torch.randn(8, 1), torch.randn(8, 1)), ["kflr"], loss="mse")
            assert caught.value.code == "out_of_memory"
            model, batch = small()
            assert client.analyze(model, batch, ["grad"]).loss > 0
    finally:
        ended = server.stop()
    assert ended == 0
