"""Sweeps: many jobs in one request, as a grid or as explicit rows."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, JsonValue, model_validator

from curvature_protocol.base import Message, Reply
from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus
from curvature_protocol.requests import Webhook

MOST_ROWS = 100_000

LETTERS: dict[JobStatus, str] = {
    JobStatus.WAITING: "w",
    JobStatus.QUEUED: "q",
    JobStatus.RUNNING: "r",
    JobStatus.CANCELLING: "x",
    JobStatus.SUCCEEDED: "s",
    JobStatus.FAILED: "f",
    JobStatus.CANCELLED: "c",
}
"""How `SweepStates` writes a row's state."""
NO_JOB = "-"
"""The same of a row whose job was deleted."""


class SweepRequest(Message):
    """The body of `POST /v1/sweeps`.

    A row is `base` with the fields of its own: a job request's, with `batch` by reference. In a grid, every combination
    of the axes' values is a row, the last axis fastest. A value may be named: the name is the row's coordinate then.
    """

    base: dict[str, JsonValue] = Field(default_factory=dict, description="fields of a job request that rows share")
    grid: dict[str, Annotated[tuple["SweepValue", ...], Field(min_length=1)]] | None = Field(
        default=None, min_length=1, description="field of a job request → its values"
    )
    rows: tuple["SweepItem", ...] | None = Field(default=None, min_length=1, max_length=MOST_ROWS)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=32)
    webhook: Webhook | None = Field(default=None, description="told once, when every job is over")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "SweepRequest":
        if (self.grid is None) == (self.rows is None):
            raise ValueError("a sweep has either a grid or rows")
        return self


class SweepValue(Message):
    """One value on an axis."""

    value: JsonValue
    name: JsonValue = Field(
        default=None,
        description="the coordinate; null: the value itself, if that is text, a number or a boolean; of a reference "
        "its `sha256`, of a loss its `name`, and else the value's place on the axis",
    )
    fields: dict[str, JsonValue] = Field(
        default_factory=dict, description="further fields that come with this value, e.g. `warnings` with a model"
    )


class SweepItem(Message):
    """One explicit row."""

    fields: dict[str, JsonValue] = Field(description="fields of a job request")
    coordinates: dict[str, JsonValue] = Field(
        default_factory=dict, description="what tells it from the others; none: its fields, as with unnamed values"
    )


class Sweep(Reply):
    """A sweep as the API shows it."""

    id: str
    created_at: datetime
    total: int
    counts: dict[JobStatus, int] = Field(description="jobs by state; states without jobs are left out")
    done: bool = Field(description="whether every job is over")
    axes: tuple[str, ...] = Field(description="names of the rows' coordinates")
    metadata: dict[str, str] = Field(default_factory=dict)


class SweepPage(Reply):
    """One page of `GET /v1/sweeps`, newest first."""

    items: tuple[Sweep, ...]
    next_cursor: str | None = None


class RowResult(Reply):
    """What of a succeeded row's manifest fits into a table."""

    loss: float | None = Field(description="L; null when it is not finite")
    timings_ms: dict[str, float] = Field(default_factory=dict)


class SweepRowView(Reply):
    """One row: its job, and where that stands."""

    row: int
    job_id: str
    coordinates: dict[str, Any]
    status: JobStatus
    error: Problem | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    result: RowResult | None = Field(default=None, description="only where asked for, and of a succeeded row")


class SweepRows(Reply):
    """`GET /v1/sweeps/{id}/rows`: rows in their order."""

    items: tuple[SweepRowView, ...]
    next_row: int | None = Field(default=None, description="`first` of the next page; null in the last")


class SweepStates(Reply):
    """`GET /v1/sweeps/{id}/states`: where all rows stand, in few bytes."""

    states: str = Field(
        description="a letter per row, in order: w(aiting), q(ueued), r(unning), x (cancelling), s(ucceeded), "
        "f(ailed), c(ancelled), - (deleted)"
    )
