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
    """One job's, renewed by its keeper while the `with` lasts.

    Attributes:
        progress: what the next renewal notes.
    """

    def __init__(self, keeper: "LeaseKeeper", database: Database, job: ClaimedJob, settings: WorkerSettings) -> None:
        self._keeper, self._database, self._job, self._settings = keeper, database, job, settings
        self.progress = Progress(phase="fetching")
        self._renew_seconds = renewal_seconds(settings)
        self._status: JobStatus | None = JobStatus.RUNNING
        self._renewed_at = time.monotonic()
        self._expires_at = self._renewed_at + settings.lease_seconds

    def __enter__(self) -> Self:
        self._keeper.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.current = None

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

    def keep(self) -> None:
        """Hear how the job stands, and renew when it is time."""
        if self._status is None:
            return
        try:
            self._status = self._ask()
        except SQLAlchemyError as error:
            logger.warning("job %s: the lease could not be renewed: %s", self._job.id, brief(error))
            if time.monotonic() > self._expires_at:
                self._status = None

    def _ask(self) -> JobStatus | None:
        """The job's status, the lease renewed when it is time."""
        job, now = self._job, time.monotonic()
        if now - self._renewed_at < self._renew_seconds:
            return holding.peek(self._database, job.id, job.attempt)
        status = holding.renew(self._database, job.id, job.attempt, self._settings.lease_seconds, self.progress)
        self._renewed_at, self._expires_at = now, now + self._settings.lease_seconds
        return status


class LeaseKeeper:
    """Keeps the lease of the job at hand in a thread of its own, so that no long step lets it run out.

    One thread for all jobs: starting one takes as long as a small job.

    Attributes:
        current: the lease to keep.
    """

    def __init__(self, database: Database, settings: WorkerSettings) -> None:
        self._database, self._settings = database, settings
        self.current: Lease | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="leases")
        self._thread.start()

    def hold(self, job: ClaimedJob) -> Lease:
        """The lease of a job just claimed."""
        return Lease(self, self._database, job, self._settings)

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed.set()
        self._thread.join()

    def _keep(self) -> None:
        pause = min(self._settings.poll_seconds, renewal_seconds(self._settings))
        while not self._closed.wait(pause):
            if (lease := self.current) is not None:
                lease.keep()


def renewal_seconds(settings: WorkerSettings) -> float:
    """How often a lease is renewed."""
    return min(settings.renew_seconds, settings.lease_seconds / _RENEWALS_PER_LEASE)


def brief(error: BaseException) -> str:
    """The first line of a database's complaint, without the statement and the link to a manual."""
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
