"""How a job ends other than with a result.

JobRefused      the job fails, with a code of the protocol's list
JobStopped      it was cancelled
LeaseLost       somebody else has it now: nothing more to do here
WorkerStopping  the worker is told to stop and hands the job back
WorkerUnfit     the worker cannot work; in the middle of a job it hands that back, too
"""

TRY_AGAIN = "submit the job again; if it persists, tell the operator"


class JobRefused(Exception):
    """The job fails with a reason that the user is told; or goes to a worker with the memory that it needs."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        remedy: str | None = None,
        needed_bytes: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.param, self.remedy = code, detail, param, remedy or TRY_AGAIN
        self.needed_bytes = needed_bytes


class JobStopped(Exception):
    """The user cancelled the job."""


class LeaseLost(Exception):
    """The job is no longer this worker's."""


class WorkerStopping(Exception):
    """The worker is told to stop: the job goes back to the queue."""


class WorkerUnfit(Exception):
    """The worker cannot work as configured; the message says why and what to do."""
