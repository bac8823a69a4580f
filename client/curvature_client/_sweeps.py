"""Sweeps as the user holds them: looked at, waited for, read row by row as they finish, cancelled, retried, deleted."""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from curvature_client._errors import (
    CurvatureError,
    JobError,
    NotFoundError,
    WaitTimeout,
    job_cancelled,
    job_failed,
    refusal,
)
from curvature_client._frames import frame_of
from curvature_client._jobs import POLL_SECONDS, SILENCE_SECONDS, Job, may_be_waited_out
from curvature_client._progress import ProgressBar
from curvature_client._results import Result, stored_result
from curvature_client._transport import Transport, backoff
from curvature_protocol.jobs import FINAL, JobStatus
from curvature_protocol.jobs import Job as JobView
from curvature_protocol.results import Manifest
from curvature_protocol.sweeps import LETTERS, NO_JOB, SweepPage, SweepRows, SweepRowView, SweepStates
from curvature_protocol.sweeps import Sweep as SweepView

if TYPE_CHECKING:
    import pandas

PAGE_SIZE = 200
ROWS_PAGE_SIZE = 1000
PAUSE_SECONDS = 0.2
"""How long lies between two looks at a sweep whose rows end one after another."""

_OVER = frozenset(LETTERS[status] for status in FINAL) | {NO_JOB}
_FAILED = LETTERS[JobStatus.FAILED]


class SweepRow:
    """One row of a sweep, as of the last look at it.

    Attributes:
        number: its place in the sweep, from 0.
        coordinates: what tells it from the others.
        job_id: its job.
    """

    def __init__(self, transport: Transport, view: SweepRowView, *, progress: bool | None = None) -> None:
        self._transport, self._view, self._progress = transport, view, progress
        self.number, self.job_id = view.row, view.job_id
        self.coordinates: dict[str, Any] = dict(view.coordinates)
        self._result: Result | None = None

    @property
    def status(self) -> str:
        """Where its job stands."""
        return self._view.status.value

    @property
    def error(self) -> JobError | None:
        """Why there is no result: a `JobFailed`, with code, param and remedy, or a `JobCancelled`."""
        if self._view.status == JobStatus.FAILED:
            return job_failed(self.job_id, self._view.error)
        return job_cancelled(self.job_id) if self._view.status == JobStatus.CANCELLED else None

    @property
    def job(self) -> Job:
        """Its job, as it is now."""
        return Job(self._transport, self._transport.get(f"/v1/jobs/{self.job_id}", JobView), progress=self._progress)

    def result(self) -> Result:
        """Its result; waits for it if need be.

        Raises:
            JobFailed: the job failed; also an instance of its error's family.
            JobCancelled: it was cancelled.
        """
        if self._result is None:
            if self._view.status not in FINAL:
                return self.job.result()
            if self.error is not None:
                raise self.error
            manifest = self._transport.get(f"/v1/jobs/{self.job_id}/result", Manifest)
            self._result = stored_result(self._transport, manifest)
        return self._result

    def __repr__(self) -> str:
        where = ", ".join(f"{name}={value!r}" for name, value in self.coordinates.items())
        return f"<SweepRow {self.number}: {where}: {self.status}>"


class Sweep:
    """Many jobs submitted together. Its attributes are as of the last look; `refresh` looks again."""

    def __init__(self, transport: Transport, view: SweepView, *, progress: bool | None = None) -> None:
        self._transport, self._view, self._progress = transport, view, progress

    @property
    def id(self) -> str:
        """The sweep's id."""
        return self._view.id

    @property
    def counts(self) -> dict[str, int]:
        """State → how many jobs are in it."""
        return {status.value: count for status, count in self._view.counts.items()}

    @property
    def done(self) -> bool:
        """Whether every job is over, one way or another."""
        return self._view.done

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the rows' coordinates."""
        return self._view.axes

    @property
    def metadata(self) -> dict[str, str]:
        """What the submitter noted."""
        return dict(self._view.metadata)

    @property
    def created_at(self) -> datetime:
        """When it was submitted."""
        return self._view.created_at

    def __len__(self) -> int:
        return self._view.total

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        return f"<Sweep {self.id}: {len(self)} rows: {counts}>"

    def refresh(self) -> "Sweep":
        """Look again."""
        self._view = self._transport.get(self._path, SweepView)
        return self

    @property
    def rows(self) -> list[SweepRow]:
        """All rows in order, as they are now: the server is asked."""
        return [self._row(view) for view in self._pages()]

    def rows_in(self, status: str) -> list[SweepRow]:
        """The rows in one state, as they are now, e.g. "failed"."""
        return [self._row(view) for view in self._pages({"status": status})]

    def wait(self, timeout: float | None = None) -> "Sweep":
        """Wait until every job is over, whichever way; Ctrl-C leaves them running.

        A lost connection is waited out like anything else.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            WaitTimeout: the sweep is not over yet, and goes on.
        """
        with ProgressBar(self._progress) as bar:
            for states in self._watch(timeout):
                over, failed = _count(states)
                bar.rows(len(self), over, failed)
        return self.refresh()

    def completed(self, timeout: float | None = None) -> Iterator[SweepRow]:
        """The rows whose jobs are over, as they come; failed ones, too. Whoever iterates anew begins anew.

        Args:
            timeout: seconds in all; None waits as long as it takes.

        Raises:
            WaitTimeout: there are others, and they go on.
        """
        told: set[int] = set()
        with ProgressBar(self._progress) as bar:
            for states in self._watch(timeout):
                over, failed = _count(states)
                bar.rows(len(self), over, failed)
                new = [place for place, letter in enumerate(states) if letter in _OVER and place not in told]
                for view in self._views_of(new, states):
                    told.add(view.row)
                    yield self._row(view)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A table of all rows as they are now (pandas must be installed).

        Columns: the coordinates; `status`; `job`, its id; `loss_value`, the loss L; `queued_seconds`,
        `running_seconds`; `error`, code and reason. No tensors are read.

        Raises:
            CurvatureError: pandas is not installed.
        """
        return frame_of(self.axes, self.views)

    def views(self) -> Iterator[SweepRowView]:
        """All rows in order as the API shows them, with loss and timings."""
        return self._pages({"results": True})

    def cancel(self) -> "Sweep":
        """Ask all jobs to stop that are not over; running ones stop within about two seconds."""
        self._view = self._transport.parse(self._transport.request("POST", f"{self._path}/cancel"), SweepView)
        return self

    def retry_failed(self) -> "Sweep":
        """Queue the failed and the cancelled jobs once more.

        Raises:
            RateLimitError: there is no room for them in the queue; none is queued then.
        """
        self._view = self._transport.parse(self._transport.request("POST", f"{self._path}/retry"), SweepView)
        return self

    def delete(self) -> None:
        """Delete the sweep, its jobs and their results from the server; that it is gone already is no error.

        Raises:
            ConflictError: a job is not over, or pinned; none is deleted then.
        """
        with suppress(NotFoundError):
            self._transport.request("DELETE", self._path)

    @property
    def _path(self) -> str:
        return f"/v1/sweeps/{self.id}"

    def _row(self, view: SweepRowView) -> SweepRow:
        return SweepRow(self._transport, view, progress=self._progress)

    def _pages(
        self, params: dict[str, Any] | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[SweepRowView]:
        """Rows from `first` to before `last`, page by page."""
        following: int | None = first
        while following is not None and (last is None or following < last):
            limit = ROWS_PAGE_SIZE if last is None else min(ROWS_PAGE_SIZE, last - following)
            asked = {"first": following, "limit": limit, **(params or {})}
            page = self._transport.get(f"{self._path}/rows", SweepRows, params=asked)
            yield from page.items
            following = page.next_row

    def _views_of(self, places: list[int], states: str) -> Iterator[SweepRowView]:
        """The rows at these places that are over; neighbours are asked for together."""
        wanted = [place for place in places if states[place] != NO_JOB]
        chosen = set(wanted)
        while wanted:
            first, page = wanted[0], [place for place in wanted if place < wanted[0] + ROWS_PAGE_SIZE]
            for view in self._pages(first=first, last=page[-1] + 1):
                if view.row in chosen and view.status in FINAL:  # or else it was retried at this moment
                    yield view
            wanted = wanted[len(page) :]

    def _watch(self, timeout: float | None) -> Iterator[str]:
        """Where all rows stand, whenever another one is over, until all are."""
        deadline = None if timeout is None else time.monotonic() + timeout
        heard_at, failures = time.monotonic(), 0
        finished: int | None = None
        while True:
            left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            try:
                states = self._states(finished, max(0.0, min(left, POLL_SECONDS)))
                heard_at, failures = time.monotonic(), 0
            except CurvatureError as error:
                if not may_be_waited_out(error):
                    raise
                failures += 1
                silent = time.monotonic() - heard_at
                if silent > SILENCE_SECONDS:
                    raise self._still_going(f"the server has not answered for {silent:.0f} s ({error})") from error
                if left > 0:
                    time.sleep(min(backoff(failures, error), left))
                    continue
                raise self._still_going(f"the server does not answer ({error})") from error
            over, _ = _count(states)
            if over != finished:
                finished = over
                looked_at = time.monotonic()
                yield states
                if over == len(states):
                    return
                time.sleep(max(0.0, looked_at + PAUSE_SECONDS - time.monotonic()))
            if deadline is not None and time.monotonic() >= deadline:
                raise self._still_going(
                    f"{len(states) - over} of the {len(states)} jobs of sweep {self.id} are not over"
                )

    def _states(self, finished: int | None, seconds: float) -> str:
        params = {} if finished is None else {"finished": finished, "wait": seconds}
        timeout = self._transport.timeout_beyond(seconds)
        return self._transport.once("GET", f"{self._path}/states", SweepStates, params=params, timeout=timeout).states

    def _still_going(self, reason: str) -> WaitTimeout:
        error = WaitTimeout(
            f"{reason}; the sweep goes on",
            code="wait_timeout",
            param="timeout",
            remedy=f"wait longer, or find it again with client.sweeps.get({self.id!r})",
        )
        error.sweep_id = self.id
        return error


def _count(states: str) -> tuple[int, int]:
    """How many rows are over, and how many of these failed."""
    return sum(states.count(letter) for letter in _OVER), states.count(_FAILED)


class Sweeps:
    """The server's sweeps."""

    def __init__(self, transport: Transport, progress: bool | None) -> None:
        self._transport, self._progress = transport, progress

    def get(self, sweep_id: str) -> Sweep:
        """A sweep by its id, from any process.

        Raises:
            NotFoundError: there is none.
        """
        if not sweep_id:
            raise refusal(
                "sweep_not_found",
                "the sweep's id is empty",
                param="sweep_id",
                remedy="client.sweeps.list() lists sweeps",
            )
        view = self._transport.get(f"/v1/sweeps/{quote(sweep_id, safe='')}", SweepView)
        return Sweep(self._transport, view, progress=self._progress)

    def list(self, *, limit: int | None = None) -> list[Sweep]:
        """Sweeps, newest first; `limit`: at most so many, None lists all."""
        found: list[Sweep] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            wanted = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            params = {"limit": wanted, **({} if cursor is None else {"cursor": cursor})}
            page = self._transport.get("/v1/sweeps", SweepPage, params=params)
            found += [Sweep(self._transport, view, progress=self._progress) for view in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
        return found
