"""From a bell to the end of the queue: claim, run, and write down how it ended."""

import logging
import time
from functools import cached_property, partial
from pathlib import Path
from threading import Event

from sqlalchemy.exc import SQLAlchemyError

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus
from curvature_state import Database, ObjectStore, holding
from curvature_state.artefacts import judge_artefact
from curvature_state.endings import Ending, confirm_cancel, fail
from curvature_state.jobs import problem
from curvature_state.turns import Claimant, ClaimedJob, claim_next, has_turn
from curvature_state.workers import list_workers
from curvature_worker.attempt import Attempt
from curvature_worker.cache import ArtefactCache
from curvature_worker.errors import TRY_AGAIN, JobRefused, JobStopped, LeaseLost, WorkerStopping, WorkerUnfit
from curvature_worker.lease import Lease, LeaseKeeper, brief
from curvature_worker.pool import ChildPool
from curvature_worker.reporter import Reporter
from curvature_worker.settings import WorkerSettings
from curvature_worker.tools import Tools

logger = logging.getLogger("curvature.worker")

_SIZES_SECONDS = 5.0
_CLAIMS = 2
"""Tries: of a database that was restarted, the first connection is a dead one."""
_NEEDS_MEMORY = frozenset({"out_of_memory", "no_fitting_worker"})


class JobRunner:
    """Runs jobs, one at a time.

    Attributes:
        stopping: set it to have the job at hand go back to the queue, and no other taken.
        draining: while it is set, the job at hand is finished, and no other taken.
        job_id: the job at hand.
    """

    def __init__(self, settings: WorkerSettings, worker_id: str, pool: ChildPool, scratch: Path) -> None:
        self._settings = settings
        self.stopping, self.draining = Event(), Event()
        self.job_id: str | None = None
        self._worker_id = worker_id
        self._sizes: list[int] = []
        self._sizes_read_at = -_SIZES_SECONDS
        self._catalogue: Catalogue | None = None
        self._pool = pool
        database = Database(settings.database_url)
        self._keeper = LeaseKeeper(database, settings)
        objects = ObjectStore(settings.storage_url)
        judge = partial(judge_artefact, database, objects)
        self._tools = Tools(
            settings=settings,
            database=database,
            objects=objects,
            cache=ArtefactCache(objects, scratch / "cache", settings.cache_bytes, judge),
            pool=pool,
            reporter=Reporter(settings.redis_url),
            scratch=scratch,
            stopping=self.stopping,
            catalogue=self._read_catalogue,
            has_larger=lambda size: self._largest_other() > size,
        )

    @cached_property
    def claimant(self) -> Claimant:
        """What this worker has to offer; known once its first child is there."""
        settings = self._settings
        memory_bytes = int(str(self._pool.greeting["budget_bytes"]))
        return Claimant(self._worker_id, settings.device != "cpu", settings.tags, memory_bytes)

    def work(self) -> None:
        """Run jobs until there is none for this worker.

        Raises:
            WorkerUnfit: if this worker can run no job any more; the one at hand went back to the queue.
        """
        while self.run_next():
            pass

    def run_next(self) -> bool:
        """Run the job whose turn it is; False if there is none. Whatever happens, its row says how it ended.

        Raises:
            WorkerUnfit: as `work`.
        """
        job = None if self.stopping.is_set() or self.draining.is_set() else self._claim()
        if job is None:
            return False
        self.job_id = job.id
        try:
            with self._keeper.hold(job) as lease:
                self._tools.reporter.state(job, JobStatus.RUNNING)
                self._run(job, lease)
        except LeaseLost:
            logger.warning("job %s is no longer ours", job.id)
        finally:
            self.job_id = None
        return True

    def is_wanted(self) -> bool:
        """Whether this worker is idle though there is a job for it.

        Raises:
            SQLAlchemyError: the database does not answer.
        """
        if self.job_id is not None or self.stopping.is_set() or self.draining.is_set():
            return False
        return has_turn(self._tools.database, self.claimant)

    def close(self) -> None:
        """Close connections."""
        self._keeper.close()
        self._tools.reporter.close()
        self._tools.database.close()

    def _claim(self) -> ClaimedJob | None:
        for _ in range(_CLAIMS):
            try:
                return claim_next(self._tools.database, self.claimant, self._settings.lease_seconds)
            except SQLAlchemyError as error:  # the bell is rung again by the reconciler
                logger.warning("no job could be claimed: the database does not answer: %s", brief(error))
        return None

    def _run(self, job: ClaimedJob, lease: Lease) -> None:
        database = self._tools.database
        try:
            self._tell(Attempt(self._tools, job, lease).run())
        except JobRefused as error:
            if not self._leave_to_larger(job, lease, error):
                self._fail(job, lease, problem(error.code, error.detail, param=error.param, remedy=error.remedy))
        except JobStopped:
            self._tell(lease.write(lambda: confirm_cancel(database, job.id, job.attempt)))
        except WorkerStopping:
            self._hand_back(job, lease)
        except WorkerUnfit:
            self._hand_back(job, lease)
            raise
        except LeaseLost:
            raise
        except SQLAlchemyError as error:
            logger.warning("job %s: the database does not answer: %s", job.id, brief(error))
            reason = "the database did not answer the worker"
            self._fail(job, lease, problem("unavailable", reason, remedy="try again later"))
        except Exception:
            logger.exception("job %s failed in the worker", job.id)
            reason = "the worker failed; the operator finds the cause in its log"
            self._fail(job, lease, problem("internal_error", reason, remedy=TRY_AGAIN))

    def _tell(self, ending: Ending | None) -> None:
        if ending is not None:
            self._tools.reporter.records((ending.job, *ending.others))

    def _fail(self, job: ClaimedJob, lease: Lease, reason: Problem) -> None:
        database, most = self._tools.database, self._settings.max_attempts
        ending = lease.write(lambda: fail(database, job.id, job.attempt, reason, most))
        if ending is not None:
            again = "; it is tried again" if ending.job.status == JobStatus.QUEUED else ""
            logger.info("job %s failed: %s: %s%s", job.id, reason.code, reason.detail, again)
        self._tell(ending)

    def _leave_to_larger(self, job: ClaimedJob, lease: Lease, error: JobRefused) -> bool:
        """Queue a job that takes more memory than there is here for a worker that has it, if one lives."""
        mine = self.claimant.memory_bytes
        if error.code not in _NEEDS_MEMORY or mine is None:
            return False
        needed = max(mine + 1, error.needed_bytes or 0)
        if self._largest_other() < needed:
            return False
        database = self._tools.database
        if lease.write(lambda: holding.release(database, job.id, job.attempt, needed)):
            logger.info("job %s needs %d bytes; it is left to a larger worker", job.id, needed)
            self._tools.reporter.state(job, JobStatus.QUEUED)
        return True

    def _hand_back(self, job: ClaimedJob, lease: Lease) -> None:
        """Back to the queue, or, if the user cancelled meanwhile, to its end."""
        database = self._tools.database
        if lease.write(lambda: holding.release(database, job.id, job.attempt)):
            logger.info("job %s handed back", job.id)
            self._tools.reporter.state(job, JobStatus.QUEUED)
        else:
            self._tell(lease.write(lambda: confirm_cancel(database, job.id, job.attempt)))

    def _read_catalogue(self) -> Catalogue:
        if self._catalogue is None:
            self._catalogue = Catalogue.model_validate(self._pool.greeting["catalogue"])
        return self._catalogue

    def _largest_other(self) -> int:
        """The memory of the largest worker that lives."""
        if time.monotonic() - self._sizes_read_at > _SIZES_SECONDS:
            workers = list_workers(self._tools.database)
            self._sizes = [worker.memory_bytes for worker in workers if not worker.draining]
            self._sizes_read_at = time.monotonic()
        return max(self._sizes, default=0)
