"""The worker process: a Celery application whose one task works until the queue is empty."""

import logging
import os
import signal
import socket
import sys
import uuid
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from celery import Celery
from celery.platforms import EX_OK
from celery.signals import setup_logging, worker_ready
from celery.worker import state
from kombu.connection import Connection
from kombu.entity import Queue
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import ArgumentError

from curvature_protocol.names import RUN_JOB_TASK, bell_queue, worker_queue
from curvature_state.broker import BrokerUnfit, celery_app, check_broker, ring
from curvature_worker.errors import WorkerUnfit
from curvature_worker.pool import ChildPool
from curvature_worker.publisher import Publisher
from curvature_worker.runner import JobRunner
from curvature_worker.scratch import scratch_folder
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")


def run_worker(settings: WorkerSettings) -> None:
    """Work until told to stop.

    Raises:
        WorkerUnfit: if the worker cannot work as configured.
    """
    try:
        check_broker(settings.redis_url)
    except BrokerUnfit as error:
        raise WorkerUnfit(str(error)) from error
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    with scratch_folder(settings.scratch_dir, worker_id) as scratch, closing(ChildPool(settings, scratch)) as pool:
        runner = _make_runner(settings, worker_id, pool, scratch)
        with closing(runner):
            pool.open()
            publisher = Publisher(settings, worker_id, pool.greeting, runner)
            publisher.start()
            try:
                logger.info(
                    "worker %s (%s) on %s, isolation %s",
                    worker_id,
                    settings.name,
                    settings.device,
                    pool.greeting["isolation"],
                )
                _serve(settings, worker_id, runner, publisher)
            finally:
                publisher.stop()


def _make_runner(settings: WorkerSettings, worker_id: str, pool: ChildPool, scratch: Path) -> JobRunner:
    try:
        return JobRunner(settings, worker_id, pool, scratch)
    except (ArgumentError, ValueError, RuntimeError, OSError, StoreError) as error:
        raise WorkerUnfit(
            f"the settings do not fit: {error}; check CURVATURE_DATABASE_URL, CURVATURE_STORAGE_URL and "
            "CURVATURE_REDIS_URL"
        ) from error


def make_app(settings: WorkerSettings, worker_id: str, work: Callable[[], None], stop: Callable[[], None]) -> Celery:
    """The Celery application with the one task.

    Args:
        settings: where the broker is.
        worker_id: this worker's; bells in the queue of that name are for it alone.
        work: runs jobs until there are none.
        stop: called as soon as the worker is told to stop.
    """
    app = celery_app(settings, "curvature-worker")
    app.amqp.Connection = PersistentConnection
    app.conf.update(
        broker_connection_max_retries=None,  # a broker may be away for as long as it likes
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_queues=_task_queues(settings, worker_id),
    )

    @app.task(name=RUN_JOB_TASK)  # type: ignore[untyped-decorator, no-untyped-call]
    def run_job(job_id: str) -> None:
        work()

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def wake(**_: Any) -> None:
        _answer_signals(stop)
        # A bell rung while no worker listened, and then lost with the broker, is rung again.
        ring(app, "", worker_queue(worker_id))

    @setup_logging.connect(weak=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def keep_logging(**_: Any) -> None:
        """Being connected keeps Celery from setting up logging its own way."""

    return app


def _answer_signals(stop: Callable[[], None]) -> None:
    """Stop in order at the first signal, at once at a second.

    Celery's own second stage would cancel the task, which its solo pool cannot: the job would fail for no fault of
    its own.
    """

    def answer(number: int, _: object) -> None:
        if state.should_stop is not None:
            raise KeyboardInterrupt
        stop()
        state.should_stop = EX_OK  # type: ignore[assignment]

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, answer)


def _queues(settings: WorkerSettings) -> list[str]:
    """The queues of the bells for jobs that this worker can do."""
    found = [bell_queue(), *(bell_queue(tag=tag) for tag in settings.tags)]
    return found if settings.device == "cpu" else [*found, bell_queue(gpu=True)]


def _task_queues(settings: WorkerSettings, worker_id: str) -> list[Queue]:
    own = Queue(worker_queue(worker_id), auto_delete=True)  # type: ignore[no-untyped-call]
    return [*(Queue(name) for name in _queues(settings)), own]  # type: ignore[no-untyped-call]


def _serve(settings: WorkerSettings, worker_id: str, runner: JobRunner, publisher: Publisher) -> None:
    """Answer bells until told to stop.

    Raises:
        WorkerUnfit: if no job can be run any more.
    """
    unfit: list[WorkerUnfit] = []

    def work() -> None:
        try:
            runner.work()
        except WorkerUnfit as error:
            unfit.append(error)
            runner.stopping.set()
            state.should_stop = EX_OK  # type: ignore[assignment]

    app = make_app(settings, worker_id, work, runner.stopping.set)
    publisher.wake_with(app)
    worker = app.Worker(
        hostname=f"curvature@{socket.gethostname()}",
        pool_cls="solo",
        queues=[*_queues(settings), worker_queue(worker_id)],
        loglevel=settings.log_level,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    if unfit:
        raise unfit[0]


class PersistentConnection(Connection):
    """To a broker that may come back at any moment: Celery's own pauses between attempts grow to half a minute."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        """Connect, with pauses of one to five seconds."""
        pauses = {"interval_start": 1, "interval_step": 1, "interval_max": 5}
        return super().ensure_connection(*args, **{**pauses, **kwargs})  # type: ignore[no-untyped-call]


def main(settings: WorkerSettings) -> int:
    """Run a worker; returns the exit status, with reasons on stderr instead of tracebacks."""
    _set_up_logging(settings.log_level)
    try:
        run_worker(settings)
    except WorkerUnfit as error:
        sys.stderr.write(f"curvature worker: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if level != "DEBUG":
        for name in ("celery", "kombu", "amqp"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Celery says so to everybody; what it warns of, files of strangers, is opened in confined processes only.
        warnings.filterwarnings("ignore", message=".*superuser privileges")
