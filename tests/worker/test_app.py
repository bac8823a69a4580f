import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from tests.worker import models
from tests.worker.desk import Desk, wait_until

from curvature_protocol.jobs import JobStatus
from curvature_state import broker
from curvature_state.reconciling import take_back_expired
from curvature_state.workers import list_workers, published_catalogue
from curvature_worker.memory import analysis_budget

pytestmark = pytest.mark.integration


class Worker:
    """A worker in a process of its own, as an operator starts it."""

    def __init__(self, settings, log, *arguments, **changes):
        self._log = log
        values = {**settings.model_dump(exclude={"tags"}), **changes}
        environment = {f"CURVATURE_{name.upper()}": str(value) for name, value in values.items() if value is not None}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "curvature_worker", *arguments],
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
            )

    @property
    def log(self):
        return self._log.read_text()

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number=signal.SIGTERM, seconds=15):
        """Tell it to stop; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def desk(settings, tmp_path):
    """Files jobs and looks at them; what runs them are workers."""
    made = Desk(settings, None, tmp_path)
    yield made
    made.close()


@pytest.fixture
def start(settings, tmp_path, redis_url, desk):
    """Starts workers; wait for them by `ready`."""
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    workers = []

    def run(*arguments, **changes):
        workers.append(Worker(settings, tmp_path / f"worker-{len(workers)}.log", *arguments, **changes))
        return workers[-1]

    yield run
    for worker in workers:
        worker.close()


@pytest.fixture
def ring(settings):
    app = broker.celery_app(settings)
    yield lambda job_id: broker.ring(app, job_id)
    app.close()


def status(desk, job_id):
    return desk.job(job_id).status


def computing(desk, job_id):
    return desk.phase(job_id) in ("loading", "computing") and status(desk, job_id) == JobStatus.RUNNING


def test_a_worker_runs_what_the_bell_calls_it_to_and_stops_when_told(desk, start, ring, settings):
    job_id = desk.submit(models.small(), models.batch())
    worker = start()
    ring(job_id)
    wait_until(lambda: status(desk, job_id) == JobStatus.SUCCEEDED)
    (view,) = list_workers(desk.database)
    assert (view.device, "rlimits" in view.isolation) == ("cpu", True)
    assert (view.name, view.tags) == (socket.gethostname(), ())
    assert view.memory_bytes == analysis_budget(settings)
    assert published_catalogue(desk.database).extensions
    children = worker.children()
    assert worker.stop() == 0
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert list_workers(desk.database) == []
    assert [p for p in settings.scratch_dir.iterdir() if p.is_dir()] == []
    assert "Traceback" not in worker.log
    assert "succeeded in" not in worker.log


def test_a_worker_publishes_the_name_and_the_tags_that_it_was_given(desk, start):
    start("--name", "gpu-1", "--tag", "large", "--tag", "a100", budget_bytes=7 * 2**30, tags="overruled")
    start(worker_name="cpu-1", tags=" small , fast,small,")
    wait_until(lambda: len(list_workers(desk.database)) == 2)
    found = {view.name: view for view in list_workers(desk.database)}
    assert found["gpu-1"].tags == ("large", "a100")
    assert found["gpu-1"].memory_bytes == 7 * 2**30
    assert found["cpu-1"].tags == ("small", "fast")


def test_a_job_whose_bell_was_lost_is_run_by_the_next_worker(desk, start):
    job_id = desk.submit(models.small(), models.batch())
    start()
    wait_until(lambda: status(desk, job_id) == JobStatus.SUCCEEDED)


def test_all_jobs_whose_bells_were_lost_are_run_once_the_reconciler_rings(desk, start, ring):
    first, *others = [desk.submit(models.small(), models.batch(), seed=seed) for seed in range(6)]
    start()
    wait_until(lambda: status(desk, first) == JobStatus.SUCCEEDED)
    for job_id in others:
        ring(job_id)
    wait_until(lambda: all(status(desk, job_id) == JobStatus.SUCCEEDED for job_id in others), seconds=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_worker_told_to_stop_hands_its_job_back(desk, start, number):
    job_id = desk.submit(models.Endless(), models.batch())
    worker = start()
    wait_until(lambda: computing(desk, job_id))
    begun = time.monotonic()
    worker.stop(number)
    assert time.monotonic() - begun < 5
    assert (status(desk, job_id), desk.job(job_id).attempt) == (JobStatus.QUEUED, 1)
    assert "handed back" in worker.log
    assert "Traceback" not in worker.log


def test_a_worker_told_twice_leaves_nothing_running(desk, start):
    job_id = desk.submit(models.Endless(), models.batch())
    worker = start()
    wait_until(lambda: computing(desk, job_id))
    children = worker.children()
    worker.process.send_signal(signal.SIGINT)
    worker.stop(signal.SIGINT)
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert status(desk, job_id) in (JobStatus.QUEUED, JobStatus.RUNNING)  # its lease will run out


def test_a_killed_worker_takes_its_children_along_and_another_finishes_the_job(desk, start, ring, settings):
    job_id = desk.submit(models.small(), models.batch(200), [{"name": "diag_ggn_mc", "options": {"mc_samples": 3000}}])
    doomed = start(lease_seconds=2.0)
    wait_until(lambda: computing(desk, job_id))
    children = doomed.children()
    assert children
    doomed.process.kill()
    doomed.process.wait()
    assert psutil.wait_procs(children, timeout=3)[1] == []
    wait_until(lambda: take_back_expired(desk.database))
    start()
    ring(job_id)
    wait_until(lambda: status(desk, job_id) == JobStatus.SUCCEEDED)
    assert desk.job(job_id).attempt == 2
    # The second worker cleared what the first had left.
    assert len([p for p in settings.scratch_dir.iterdir() if p.is_dir()]) == 1


def test_a_broker_that_goes_away_is_found_again(desk, start, tmp_path, settings):
    from curvature_service.embedded.broker import broker_command, find_broker

    socket = Path("/tmp") / f"cw-{os.getpid()}.sock"
    url = f"unix://{socket}?db=0"

    def start_broker():
        process = subprocess.Popen(broker_command(find_broker(), socket, tmp_path), stdout=subprocess.DEVNULL)
        wait_until(socket.exists)
        return process

    server = start_broker()
    try:
        worker = start(redis_url=url)
        wait_until(lambda: "isolation" in worker.log)
        server.kill()
        server.wait()
        socket.unlink(missing_ok=True)
        wait_until(lambda: "Trying again" in worker.log)
        server = start_broker()
        app = broker.celery_app(settings.model_copy(update={"redis_url": url}))
        job_id = desk.submit(models.small(), models.batch())
        wait_until(lambda: broker.ring(app, job_id))
        wait_until(lambda: status(desk, job_id) == JobStatus.SUCCEEDED)
        app.close()
        assert worker.stop() == 0
    finally:
        server.kill()
        server.wait()
        socket.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "cuda:99"], "device cuda:99 does not exist"),
        (["--device", "abacus"], "a device is cpu, cuda or cuda:N; got 'abacus'"),
        (["--log-level", "loud"], "a log level is"),
        (["--threads", "0"], "threads: "),
        (["--tag", "two words"], "a tag is made of up to 64 letters"),
        (["--name", ""], "a worker's name has 1 to 255 printable characters"),
        (["--memory-limit-gib", "0.1"], "memory_limit_bytes: "),
    ],
)
def test_settings_that_do_not_fit_are_one_line_and_status_one(start, arguments, part):
    worker = start(*arguments, device="cpu")
    assert worker.process.wait(30) == 1
    last = worker.log.splitlines()[-1]
    assert last.startswith("curvature worker: ")
    assert part in last
    assert "Traceback" not in worker.log


def test_a_database_url_that_is_none_is_one_line_and_status_one(start):
    worker = start(database_url="nonsense")
    assert worker.process.wait(30) == 1
    assert "CURVATURE_DATABASE_URL" in worker.log.splitlines()[-1]
    assert "Traceback" not in worker.log
