"""The worker in the database: what it is and can, and what operators want of it."""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from celery import Celery
from sqlalchemy.exc import SQLAlchemyError

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_protocol.names import worker_queue
from curvature_state import Database
from curvature_state.broker import ring
from curvature_state.workers import HEARD_SECONDS, is_draining, publish_worker, remove_worker
from curvature_worker.lease import brief
from curvature_worker.runner import JobRunner
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")


class Publisher(threading.Thread):
    """Publishes the worker every few seconds, and sees that it neither sleeps nor works against orders."""

    def __init__(
        self, settings: WorkerSettings, worker_id: str, greeting: Mapping[str, object], runner: JobRunner
    ) -> None:
        super().__init__(daemon=True, name="publisher")
        self._settings, self._worker_id, self._runner = settings, worker_id, runner
        self._catalogue = Catalogue.model_validate(greeting["catalogue"])
        self._isolation = str(greeting["isolation"])
        self._memory_bytes = int(str(greeting["budget_bytes"]))
        self._app: Celery | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Publish until stopped, then withdraw; a database that is away is tried again."""
        database = Database(self._settings.database_url)
        try:
            while not self._stopped.is_set():
                self._attempt(lambda: self._round(database))
                self._stopped.wait(HEARD_SECONDS)
            self._attempt(lambda: remove_worker(database, self._worker_id))
        finally:
            database.close()

    def wake_with(self, app: Celery) -> None:
        """Ring for the worker by this application where it sleeps although there is work."""
        self._app = app

    def stop(self) -> None:
        """Withdraw the worker's row."""
        self._stopped.set()
        self.join(5)

    def _round(self, database: Database) -> None:
        publish_worker(database, self._view(), self._catalogue)
        if is_draining(database, self._worker_id):
            self._runner.draining.set()
        else:
            self._runner.draining.clear()
        # A bell may have been heard by a worker that cannot do the job, and jobs wait for a moment of their own.
        if self._app is not None and self._runner.is_wanted():
            ring(self._app, "", worker_queue(self._worker_id))

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
