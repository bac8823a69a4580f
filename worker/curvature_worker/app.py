"""The worker process: a Celery application whose one task runs one job."""

import logging
import os
import signal
import socket
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery import Celery
from celery.platforms import EX_OK
from celery.signals import setup_logging, worker_ready
from celery.worker import state
from kombu.connection import Connection
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state import Database
from curvature_state.broker import celery_app, ring
from curvature_state.jobs import oldest_queued
from curvature_state.workers import publish_worker, remove_worker
from curvature_worker.errors import WorkerUnfit
from curvature_worker.lease import brief
from curvature_worker.pool import ChildPool
from curvature_worker.runner import JobRunner
from curvature_worker.scratch import scratch_folder
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_PUBLISH_SECONDS = 5.0


def run_worker(settings: WorkerSettings) -> None:
    """Work until told to stop.

    Raises:
        WorkerUnfit: if the worker cannot work as configured.
    """
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    with scratch_folder(settings.scratch_dir, worker_id) as scratch, closing(ChildPool(settings, scratch)) as pool:
        runner = _make_runner(settings, worker_id, pool, scratch)
        with closing(runner):
            pool.open()
            publisher = Publisher(settings, worker_id, pool.greeting)
            publisher.start()
            try:
                logger.info(
                    "worker %s (%s) on %s, isolation %s",
                    worker_id,
                    settings.name,
                    settings.device,
                    pool.greeting["isolation"],
                )
                _serve(settings, runner)
            finally:
                publisher.stop()


def _make_runner(settings: WorkerSettings, worker_id: str, pool: ChildPool, scratch: Path) -> JobRunner:
    try:
        return JobRunner(settings, worker_id, pool, scratch)
    except (ArgumentError, ValueError, OSError, StoreError) as error:
        raise WorkerUnfit(
            f"the settings do not fit: {error}; check CURVATURE_DATABASE_URL, CURVATURE_STORAGE_URL and "
            "CURVATURE_REDIS_URL"
        ) from error


def make_app(settings: WorkerSettings, run: Callable[[str], None], stop: Callable[[], None]) -> Celery:
    """The Celery application with the one task.

    Args:
        settings: where the broker is.
        run: runs the job of an id.
        stop: called as soon as the worker is told to stop.
    """
    app = celery_app(settings, "curvature-worker")
    app.amqp.Connection = PersistentConnection
    app.conf.update(
        broker_connection_max_retries=None,  # a broker may be away for as long as it likes
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )

    @app.task(name=RUN_JOB_TASK)  # type: ignore[untyped-decorator, no-untyped-call]
    def run_job(job_id: str) -> None:
        run(job_id)

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def wake(**_: Any) -> None:
        _answer_signals(stop)
        _ring_for_the_oldest(app, settings)

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


def _ring_for_the_oldest(app: Celery, settings: WorkerSettings) -> None:
    """A bell rung while no worker listened, and then lost with the broker, is rung again.

    The reconciler rings for the others; this one keeps an idle worker from waiting for it.
    """
    database = Database(settings.database_url)
    try:
        if (job_id := oldest_queued(database)) is not None:
            ring(app, job_id)
    except SQLAlchemyError as error:
        logger.warning("the database does not answer: %s", brief(error))
    finally:
        database.close()


def _serve(settings: WorkerSettings, runner: JobRunner) -> None:
    """Answer bells until told to stop.

    Raises:
        WorkerUnfit: if no job can be run any more.
    """
    unfit: list[WorkerUnfit] = []

    def run(job_id: str) -> None:
        try:
            runner.run(job_id)
        except WorkerUnfit as error:
            unfit.append(error)
            runner.stopping.set()
            state.should_stop = EX_OK  # type: ignore[assignment]

    app = make_app(settings, run, runner.stopping.set)
    worker = app.Worker(
        hostname=f"curvature@{socket.gethostname()}",
        pool_cls="solo",
        queues=[QUEUE],
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


class Publisher(threading.Thread):
    """Publishes the worker to the database every few seconds."""

    def __init__(self, settings: WorkerSettings, worker_id: str, greeting: Mapping[str, object]) -> None:
        super().__init__(daemon=True, name="publisher")
        self._settings, self._worker_id = settings, worker_id
        self._catalogue = Catalogue.model_validate(greeting["catalogue"])
        self._isolation = str(greeting["isolation"])
        self._memory_bytes = int(str(greeting["budget_bytes"]))
        self._stopped = threading.Event()

    def run(self) -> None:
        """Publish until stopped, then withdraw; a database that is away is tried again."""
        database = Database(self._settings.database_url)
        try:
            while not self._stopped.is_set():
                self._attempt(lambda: publish_worker(database, self._view(), self._catalogue))
                self._stopped.wait(_PUBLISH_SECONDS)
            self._attempt(lambda: remove_worker(database, self._worker_id))
        finally:
            database.close()

    def stop(self) -> None:
        """Withdraw the worker's row."""
        self._stopped.set()
        self.join(5)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except SQLAlchemyError as error:
            logger.warning("the worker's record could not be written: %s", brief(error))

    def _view(self) -> WorkerView:
        return WorkerView(
            id=self._worker_id,
            name=self._settings.name,
            memory_bytes=self._memory_bytes,
            tags=self._settings.tags,
            device=self._settings.device,
            engine_version=self._catalogue.engine_version,
            isolation=self._isolation,
            seen_at=datetime.now(UTC),
        )


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
