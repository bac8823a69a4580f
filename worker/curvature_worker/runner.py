"""From a bell to a job's end: claim, run, and write down how it ended."""

import logging
from pathlib import Path
from threading import Event

from sqlalchemy.exc import SQLAlchemyError

from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus
from curvature_state import Database, ObjectStore, jobs
from curvature_worker.attempt import Attempt, Tools
from curvature_worker.cache import ArtefactCache
from curvature_worker.errors import TRY_AGAIN, JobRefused, JobStopped, LeaseLost, WorkerStopping, WorkerUnfit
from curvature_worker.lease import Lease, brief
from curvature_worker.pool import ChildPool
from curvature_worker.reporter import Reporter
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")


class JobRunner:
    """Runs jobs, one at a time.

    Attributes:
        stopping: set it to have the job at hand go back to the queue, and no other taken.
    """

    def __init__(self, settings: WorkerSettings, worker_id: str, pool: ChildPool, scratch: Path) -> None:
        self._settings, self._worker_id = settings, worker_id
        self.stopping = Event()
        objects = ObjectStore(settings.storage_url)
        self._tools = Tools(
            settings=settings,
            database=Database(settings.database_url),
            objects=objects,
            cache=ArtefactCache(objects, scratch / "cache", settings.cache_bytes),
            pool=pool,
            reporter=Reporter(settings.redis_url),
            scratch=scratch,
            stopping=self.stopping,
        )

    def run(self, job_id: str) -> None:
        """Run a job if it can be claimed; whatever happens, its row says how it ended.

        Raises:
            WorkerUnfit: if this worker can run no job any more; this one went back to the queue.
        """
        job = None if self.stopping.is_set() else self._claim(job_id)
        if job is None:
            return
        try:
            with Lease(self._tools.database, job, self._settings) as lease:
                self._tools.reporter.state(job, JobStatus.RUNNING)
                self._run(job, lease)
        except LeaseLost:
            logger.warning("job %s is no longer ours", job.id)

    def close(self) -> None:
        """Close connections."""
        self._tools.reporter.close()
        self._tools.database.close()

    def _claim(self, job_id: str) -> jobs.ClaimedJob | None:
        try:
            return jobs.claim(self._tools.database, job_id, self._worker_id, self._settings.lease_seconds)
        except SQLAlchemyError as error:  # the bell is rung again by the reconciler
            logger.warning("job %s could not be claimed: the database does not answer: %s", job_id, brief(error))
            return None

    def _run(self, job: jobs.ClaimedJob, lease: Lease) -> None:
        database, reporter = self._tools.database, self._tools.reporter
        try:
            Attempt(self._tools, job, lease).run()
            reporter.state(job, JobStatus.SUCCEEDED)
        except JobRefused as error:
            self._fail(job, lease, jobs.problem(error.code, error.detail, param=error.param, remedy=error.remedy))
        except JobStopped:
            if lease.write(lambda: jobs.confirm_cancel(database, job.id, job.attempt)):
                reporter.state(job, JobStatus.CANCELLED)
        except WorkerStopping:
            self._hand_back(job, lease)
        except WorkerUnfit:
            self._hand_back(job, lease)
            raise
        except LeaseLost:
            raise
        except Exception:
            logger.exception("job %s failed in the worker", job.id)
            self._fail(
                job,
                lease,
                jobs.problem(
                    "internal_error",
                    "the worker failed; the operator finds the cause in its log",
                    remedy=TRY_AGAIN,
                ),
            )

    def _fail(self, job: jobs.ClaimedJob, lease: Lease, problem: Problem) -> None:
        database = self._tools.database
        if lease.write(lambda: jobs.fail(database, job.id, job.attempt, problem)):
            logger.info("job %s failed: %s: %s", job.id, problem.code, problem.detail)
            record = jobs.get_job(database, job.id)
            self._tools.reporter.state(job, JobStatus.FAILED, record)

    def _hand_back(self, job: jobs.ClaimedJob, lease: Lease) -> None:
        """Back to the queue, or, if the user cancelled meanwhile, to its end."""
        database, reporter = self._tools.database, self._tools.reporter
        if lease.write(lambda: jobs.release(database, job.id, job.attempt)):
            logger.info("job %s handed back", job.id)
            reporter.state(job, JobStatus.QUEUED)
        elif lease.write(lambda: jobs.confirm_cancel(database, job.id, job.attempt)):
            reporter.state(job, JobStatus.CANCELLED)
