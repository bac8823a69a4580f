"""Keeping a job's lease while the worker fetches, waits and stores, and hearing of a cancellation."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from curvature_protocol.jobs import JobStatus, Progress
from curvature_state import Database, holding
from curvature_state.turns import ClaimedJob
from curvature_worker.errors import JobStopped, LeaseLost
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

T = TypeVar("T")

_RETRY_SECONDS = 0.5
_RENEWALS_PER_LEASE = 4
"""At least; so that one that fails, or comes late, does not cost the lease."""


class Lease:
    """Renews in a thread of its own, so that no long step lets the lease run out.

    Attributes:
        progress: what the next renewal notes.
    """

    def __init__(self, database: Database, job: ClaimedJob, settings: WorkerSettings) -> None:
        self._database, self._job, self._settings = database, job, settings
        self.progress = Progress(phase="fetching")
        self._renew_seconds = min(settings.renew_seconds, settings.lease_seconds / _RENEWALS_PER_LEASE)
        self._status: JobStatus | None = JobStatus.RUNNING
        self._renewed_at = time.monotonic()
        self._expires_at = self._renewed_at + settings.lease_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name=f"lease-{job.id}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """See whether the job is still wanted from this worker.

        Raises:
            LeaseLost: it is somebody else's, or nobody can say.
            JobStopped: it is to be cancelled.
        """
        if self._status is None:
            raise LeaseLost
        if self._status == JobStatus.CANCELLING:
            raise JobStopped

    def write(self, change: Callable[[], T]) -> T:
        """Change the job's row; a database that is away for a moment costs no result.

        Raises:
            LeaseLost: if it stays away until the lease has run out.
        """
        while True:
            try:
                return change()
            except SQLAlchemyError as error:
                if time.monotonic() > self._expires_at:
                    raise LeaseLost from error
                logger.warning("job %s: the database does not answer, trying again: %s", self._job.id, brief(error))
                time.sleep(_RETRY_SECONDS)

    def _keep(self) -> None:
        while not self._ended.wait(min(self._settings.poll_seconds, self._renew_seconds)):
            try:
                self._status = self._ask()
            except SQLAlchemyError as error:
                logger.warning("job %s: the lease could not be renewed: %s", self._job.id, brief(error))
                if time.monotonic() > self._expires_at:
                    self._status = None
            if self._status is None:
                return

    def _ask(self) -> JobStatus | None:
        """The job's status, the lease renewed when it is time."""
        job, now = self._job, time.monotonic()
        if now - self._renewed_at < self._renew_seconds:
            return holding.peek(self._database, job.id, job.attempt)
        status = holding.renew(self._database, job.id, job.attempt, self._settings.lease_seconds, self.progress)
        self._renewed_at, self._expires_at = now, now + self._settings.lease_seconds
        return status


def brief(error: BaseException) -> str:
    """The first line of a database's complaint, without the statement and the link to a manual."""
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
