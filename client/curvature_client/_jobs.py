"""Jobs as the user holds them: looked at, waited for, followed, cancelled."""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import quote

from httpx_sse import EventSource
from pydantic import ValidationError

from curvature_client._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    CurvatureError,
    JobFailed,
    NotFoundError,
    WaitTimeout,
    job_cancelled,
    job_failed,
    refusal,
)
from curvature_client._progress import ProgressBar
from curvature_client._results import Result, inline_result, stored_result
from curvature_client._transport import Transport, backoff, may_pass
from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import FINAL, JobPage, JobStatus, Progress
from curvature_protocol.jobs import Job as JobView
from curvature_protocol.results import Manifest

POLL_SECONDS = 20.0
"""How long one request waits for news; the wait goes on with the next."""

SILENCE_SECONDS = 300.0
"""After so long without a word from the server, even an unlimited wait ends."""

PAGE_SIZE = 200


class Job:
    """One job on the server. Its attributes are as of the last look; `refresh` looks again.

    `status` is one of waiting (for the shards of its data set), queued, running, cancelling, succeeded, failed,
    cancelled.
    """

    def __init__(self, transport: Transport, view: JobView, *, progress: bool | None = None) -> None:
        self._transport, self._view, self._progress_shown = transport, view, progress
        self._result: Result | None = None if view.result is None else inline_result(transport, view.result)

    @property
    def id(self) -> str:
        """The job's id."""
        return self._view.id

    @property
    def status(self) -> str:
        """Where it stands."""
        return self._view.status.value

    @property
    def progress(self) -> Progress | None:
        """Phase, columns (of a data set: shards) done, and how many in all."""
        return self._view.progress

    @property
    def error(self) -> JobFailed | None:
        """Why it failed, with code, param and remedy."""
        if self._view.status != JobStatus.FAILED:
            return None
        return job_failed(self.id, self._view.error)

    @property
    def warnings(self) -> list[str]:
        """What was noticed on the way."""
        return list(self._view.warnings)

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for; model and batch by their hashes."""
        return dict(self._view.request)

    @property
    def metadata(self) -> dict[str, str]:
        """What the submitter noted."""
        return dict(self._view.metadata)

    @property
    def priority(self) -> int:
        """0 (last) to 9 (first)."""
        return self._view.priority

    @property
    def attempt(self) -> int:
        """How many times a worker has taken it up."""
        return self._view.attempt

    @property
    def created_at(self) -> datetime:
        """When it was submitted."""
        return self._view.created_at

    @property
    def started_at(self) -> datetime | None:
        """When a worker last took it up."""
        return self._view.started_at

    @property
    def finished_at(self) -> datetime | None:
        """When it was over."""
        return self._view.finished_at

    @property
    def parts(self) -> int | None:
        """Over a data set: how many shards it has."""
        return self._view.parts

    @property
    def parent(self) -> str | None:
        """Of a shard: the id of the job over the data set."""
        return self._view.parent

    @property
    def sweep(self) -> str | None:
        """The id of the sweep that it belongs to."""
        return self._view.sweep

    @property
    def coordinates(self) -> dict[str, Any] | None:
        """What tells it from the sweep's other jobs."""
        return None if self._view.coordinates is None else dict(self._view.coordinates)

    @property
    def pinned(self) -> bool:
        """Whether age and size limits leave its result alone."""
        return self._view.pinned

    @property
    def done(self) -> bool:
        """Whether it is over, one way or another."""
        return self._view.status in FINAL

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.status}>"

    def refresh(self) -> "Job":
        """Look again."""
        self._view = self._transport.get(self._path, JobView)
        return self

    def wait(self, timeout: float | None = None) -> "Job":
        """Wait until the job is over, whichever way; Ctrl-C leaves it running.

        A lost connection is waited out like anything else.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            WaitTimeout: the job is not over yet, and goes on.
            APIStatusError: the server refuses to tell (401, 403), or does not know the job any more (404).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with ProgressBar(self._progress_shown) as bar:
            self._wait(deadline, bar)
        return self

    def result(self) -> Result:
        """The result; waits for it if need be.

        Raises:
            JobFailed: the job failed; also an instance of its error's family.
            JobCancelled: it was cancelled.
        """
        if not self.done:
            self.wait()
        self.check()
        if self._result is None:
            manifest = self._transport.get(f"{self._path}/result", Manifest)
            self._result = stored_result(self._transport, manifest)
        return self._result

    def check(self) -> None:
        """Raise if the job is over without having succeeded.

        Raises:
            JobFailed: the job failed; also an instance of its error's family.
            JobCancelled: it was cancelled.
        """
        if self._view.status == JobStatus.FAILED:
            raise job_failed(self.id, self._view.error)
        if self._view.status == JobStatus.CANCELLED:
            raise job_cancelled(self.id)

    def cancel(self) -> "Job":
        """Ask the job to stop; a running one stops within about two seconds.

        Raises:
            ConflictError: it has succeeded or failed already.
        """
        self._view = self._transport.parse(self._transport.request("POST", f"{self._path}/cancel"), JobView)
        return self

    def retry(self) -> "Job":
        """Queue a failed or cancelled job once more; of one over a data set, the shards that have not succeeded.

        Raises:
            ConflictError: it has succeeded, or is not over.
            RateLimitError: there is no room in the queue.
        """
        self._view = self._transport.parse(self._transport.request("POST", f"{self._path}/retry"), JobView)
        self._result = None
        return self

    def pin(self) -> "Job":
        """Keep the job and its result from being removed: by age, for their size, or by `delete`."""
        return self._set_pin("PUT")

    def unpin(self) -> "Job":
        """Take the pin away."""
        return self._set_pin("DELETE")

    def delete(self) -> None:
        """Delete the job and its result from the server; that it is gone already is no error.

        Raises:
            ConflictError: it is not over, or pinned.
        """
        with suppress(NotFoundError):
            self._transport.request("DELETE", self._path)

    def events(self) -> Iterator[JobEvent]:
        """Changes of state and progress from the beginning, as they happen, until the job is over for good."""
        after: str | None = None
        told: tuple[JobStatus, int, Progress | None] | None = None
        failures = 0
        while True:
            try:
                for event_id, event in self._stream(after, POLL_SECONDS):
                    failures, after = 0, event_id or after
                    shards = event.progress if event.status == JobStatus.WAITING else None
                    state = (event.status, event.attempt, shards)
                    if event.event == "state" and state == told:  # told anew by each connection
                        continue
                    told = state
                    yield event
                    if event.status in FINAL and not self._was_taken_up_after(event):
                        return
            except APIConnectionError as error:
                failures += 0 if isinstance(error, APITimeoutError) else 1
                if failures > self._transport.max_retries:
                    raise
                time.sleep(backoff(max(1, failures), error) if failures else 0.0)

    # Waiting

    def _set_pin(self, verb: str) -> "Job":
        self._view = self._transport.parse(self._transport.request(verb, f"{self._path}/pin"), JobView)
        return self

    @property
    def _path(self) -> str:
        return f"/v1/jobs/{self.id}"

    def _wait(self, deadline: float | None, bar: ProgressBar) -> None:
        heard_at, failures = time.monotonic(), 0
        after: str | None = None
        while not self.done:
            left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise self._still_going(f"job {self.id} is still {self.status}")
            try:
                after = self._await_news(min(left, POLL_SECONDS), after, bar)
                heard_at, failures = time.monotonic(), 0
            except CurvatureError as error:
                if not may_be_waited_out(error):
                    raise
                failures += 1
                silent = time.monotonic() - heard_at
                if silent > SILENCE_SECONDS:
                    raise self._still_going(f"the server has not answered for {silent:.0f} s ({error})") from error
                time.sleep(min(backoff(failures, error), max(0.0, left)))

    def _await_news(self, seconds: float, after: str | None, bar: ProgressBar) -> str | None:
        """Wait for the job's end for so long; returns the id of the last event seen."""
        if not bar.shown:
            timeout = self._transport.timeout_beyond(seconds)
            self._view = self._transport.once("GET", self._path, JobView, params={"wait": seconds}, timeout=timeout)
            return after
        for event_id, event in self._stream(after, seconds):
            after = event_id or after
            bar.job(event)
            if event.status in FINAL:
                break
        self._view = self._transport.once("GET", self._path, JobView)
        return after

    def _stream(self, after: str | None, seconds: float) -> Iterator[tuple[str, JobEvent]]:
        """(id, event) after an event, for so long; the server closes the stream then."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if after is not None:
            headers["Last-Event-ID"] = after
        timeout = self._transport.timeout_beyond(seconds)
        with self._transport.stream(
            "GET", f"{self._path}/events", headers=headers, params={"wait": seconds}, timeout=timeout
        ) as response:
            for message in EventSource(response).iter_sse():
                try:
                    yield message.id, JobEvent.model_validate_json(message.data)
                except ValidationError:
                    continue  # an event of a newer server

    def _was_taken_up_after(self, event: JobEvent) -> bool:
        """Whether an end was not the last: the job was retried."""
        view = self.refresh()._view
        return (view.status, view.attempt) != (event.status, event.attempt)

    def _still_going(self, reason: str) -> WaitTimeout:
        error = WaitTimeout(
            f"{reason}; it goes on",
            code="wait_timeout",
            param="timeout",
            remedy=f"wait longer, or find it again with client.jobs.get({self.id!r})",
        )
        error.job_id = self.id
        return error


def may_be_waited_out(error: CurvatureError) -> bool:
    """Whether the server, or what stands before it, may answer later: everything but a refusal of the request."""
    failed = isinstance(error, APIStatusError) and error.status_code >= 500
    return failed or may_pass(error) or isinstance(error, APIConnectionError)


class Jobs:
    """The server's jobs."""

    def __init__(self, transport: Transport, progress: bool | None) -> None:
        self._transport, self._progress = transport, progress

    def get(self, job_id: str) -> Job:
        """A job by its id, from any process.

        Raises:
            NotFoundError: there is none.
        """
        if not job_id:
            raise refusal(
                "job_not_found", "the job's id is empty", param="job_id", remedy="client.jobs.list() lists jobs"
            )
        view = self._transport.get(f"/v1/jobs/{quote(job_id, safe='')}", JobView)
        return Job(self._transport, view, progress=self._progress)

    def list(self, *, status: str | None = None, limit: int | None = None, kind: str = "analysis") -> list[Job]:
        """Jobs, newest first.

        Args:
            kind: "analysis", "plan" or "inspection".
            status: only those in this state.
            limit: at most so many; None lists all.
        """
        found: list[Job] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            wanted = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            params = {"kind": kind, "status": status, "limit": wanted, "cursor": cursor}
            given = {name: value for name, value in params.items() if value is not None}
            page = self._transport.get("/v1/jobs", JobPage, params=given)
            found += [Job(self._transport, view, progress=self._progress) for view in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
        return found
