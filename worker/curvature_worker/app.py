"""The worker process: a Celery application whose one task runs one job."""

import logging
import os
import shutil
import socket
import sys
import threading
import uuid
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state import Database
from curvature_state.broker import celery_app, ring
from curvature_state.jobs import oldest_queued
from curvature_state.workers import publish_worker, remove_worker
from curvature_worker.errors import WorkerUnfit
from curvature_worker.pool import ChildPool
from curvature_worker.runner import JobRunner
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_PUBLISH_SECONDS = 5.0


def run_worker(settings: WorkerSettings) -> None:
    """Work until told to stop.

    Raises:
        WorkerUnfit: if the worker cannot work as configured.
    """
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    scratch = settings.scratch_dir / worker_id
    scratch.mkdir(parents=True)
    pool = ChildPool(settings, scratch)
    try:
        pool.open()
        runner = JobRunner(settings, worker_id, pool, scratch)
        publisher = _Publisher(settings, worker_id, pool.greeting)
        publisher.start()
        try:
            app = make_app(settings, runner)
            logger.info("worker %s on %s, isolation %s", worker_id, settings.device, pool.greeting["isolation"])
            _serve(app, settings)
        finally:
            publisher.stop()
            runner.close()
    finally:
        pool.close()
        shutil.rmtree(scratch, ignore_errors=True)


def make_app(settings: WorkerSettings, runner: JobRunner) -> Celery:
    """The Celery application with the one task."""
    app = celery_app(settings, "curvature-worker")

    @app.task(name=RUN_JOB_TASK)  # type: ignore[untyped-decorator, no-untyped-call]
    def run_job(job_id: str) -> None:
        runner.run(job_id)

    @worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def stop(**_: Any) -> None:
        runner.stopping.set()

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def wake(**_: Any) -> None:
        # A bell rung while no worker listened, and then lost with the broker, is rung again.
        database = Database(settings.database_url)
        if (job_id := oldest_queued(database)) is not None:
            ring(app, job_id)
        database.close()

    return app


def _serve(app: Celery, settings: WorkerSettings) -> None:
    arguments = ["worker", "--pool=solo", f"--queues={QUEUE}", f"--loglevel={settings.log_level}"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    try:
        app.worker_main(arguments)  # type: ignore[no-untyped-call]
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise


class _Publisher(threading.Thread):
    """Publishes the worker to the database every few seconds."""

    def __init__(self, settings: WorkerSettings, worker_id: str, greeting: dict[str, Any]) -> None:
        super().__init__(daemon=True, name="publisher")
        self._settings, self._worker_id = settings, worker_id
        self._catalogue = Catalogue.model_validate(greeting["catalogue"])
        self._isolation = str(greeting["isolation"])
        self._stopped = threading.Event()

    def run(self) -> None:
        database = Database(self._settings.database_url)
        while True:
            view = WorkerView(
                id=self._worker_id,
                device=self._settings.device,
                engine_version=self._catalogue.engine_version,
                isolation=self._isolation,
                seen_at=datetime.now(UTC),
            )
            try:
                publish_worker(database, view, self._catalogue)
            except Exception:  # the database may be away for a while
                logger.exception("publishing the worker failed")
            if self._stopped.wait(_PUBLISH_SECONDS):
                break
        remove_worker(database, self._worker_id)
        database.close()

    def stop(self) -> None:
        """Withdraw the worker's row."""
        self._stopped.set()
        self.join(5)


def main(settings: WorkerSettings) -> int:
    """Run a worker; returns the exit status, with reasons on stderr instead of tracebacks."""
    logging.basicConfig(
        level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        run_worker(settings)
    except WorkerUnfit as error:
        sys.stderr.write(f"curvature worker: {error}\n")
        return 1
    return 0
