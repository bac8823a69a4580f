"""Keeping in touch while an attempt goes on: with its processes, with the lease, with the job's followers."""

import time
from datetime import UTC, datetime
from typing import Any

from curvature_protocol.jobs import Progress
from curvature_state.turns import ClaimedJob
from curvature_worker.channel import ChannelClosed
from curvature_worker.errors import JobRefused, WorkerStopping
from curvature_worker.launcher import Confined
from curvature_worker.lease import Lease
from curvature_worker.tools import Tools

_SEND_SECONDS = 30.0
_PHASES = ("loading", "computing", "merging")


class Contact:
    """Of one attempt.

    Attributes:
        timings: step → milliseconds.
    """

    def __init__(self, tools: Tools, job: ClaimedJob, lease: Lease) -> None:
        self._tools, self._job, self._lease = tools, job, lease
        self.timings = {"queue": 1e3 * (datetime.now(UTC) - job.created_at).total_seconds()}
        self._mark = time.perf_counter()

    def check(self) -> None:
        """Whether to go on.

        Raises:
            WorkerStopping, JobStopped, LeaseLost: as they say.
        """
        if self._tools.stopping.is_set():
            raise WorkerStopping
        self._lease.check()

    def tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Note progress for the next renewal and publish it."""
        self._lease.progress = Progress(phase=phase, done=done, total=total)
        self._tools.reporter.progress(self._job, self._lease.progress)

    def lap(self, name: str) -> None:
        """Count the time since the last lap towards a step."""
        now = time.perf_counter()
        self.timings[name] = self.timings.get(name, 0.0) + 1e3 * (now - self._mark)
        self._mark = now

    def send(self, process: Confined, message: dict[str, Any]) -> None:
        """Give a process its order.

        Raises:
            ChannelClosed: it is gone.
        """
        process.channel.send(message, _SEND_SECONDS)

    def listen(self, process: Confined, wanted: set[str], who: str, seconds: float | None) -> dict[str, Any]:
        """Wait for a process's word, with an eye on cancellation and time.

        Raises:
            JobRefused: if it dies, stops making sense, or takes longer than `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                message = process.channel.receive(self._tools.settings.poll_seconds)
                if message is not None and message.get("event") in wanted:
                    return message
                if message is not None:
                    self._note(message)
            except ChannelClosed as error:
                raise death_of(process, who) from error
            self.check()
            if deadline is not None and time.monotonic() > deadline:
                raise JobRefused(
                    "job_timeout", f"{who} took longer than its limit of {seconds:g} s", remedy="raise timeout_seconds"
                )

    def _note(self, message: dict[str, Any]) -> None:
        """Pass progress on.

        Raises:
            ChannelClosed: on anything that no honest child says.
        """
        phase, done, total = message.get("phase"), message.get("done"), message.get("total")
        if phase not in _PHASES or not isinstance(done, int) or not isinstance(total, int):
            raise ChannelClosed("a message that is no progress")
        self.tell(phase, done, total)


def death_of(process: Confined, who: str) -> JobRefused:
    """The refusal of a job whose process is gone."""
    code, how, remedy = process.death()
    return JobRefused(code, f"{who} {how}", remedy=remedy)
