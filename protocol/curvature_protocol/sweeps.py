"""Sweeps: many jobs in one request, as a grid or as explicit rows."""

from datetime import datetime
from typing import Any

from pydantic import Field, JsonValue, model_validator

from curvature_protocol.base import Message, Reply
from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus
from curvature_protocol.requests import Webhook

MOST_ROWS = 100_000


class SweepRequest(Message):
    """The body of `POST /v1/sweeps`.

    A row is `base` with the fields of its own: a job request's, with `batch` by reference. In a grid, every combination
    of the axes' values is a row, the last axis fastest. A value may be named: the name is the row's coordinate then.
    """

    base: dict[str, JsonValue] = Field(default_factory=dict, description="fields of a job request that rows share")
    grid: dict[str, tuple["SweepValue", ...]] | None = Field(
        default=None, description="field of a job request → its values"
    )
    rows: tuple["SweepItem", ...] | None = Field(default=None, max_length=MOST_ROWS)
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
    name: JsonValue = Field(default=None, description="the coordinate; null: the value itself")


class SweepItem(Message):
    """One explicit row."""

    fields: dict[str, JsonValue] = Field(description="fields of a job request")
    coordinates: dict[str, JsonValue] = Field(default_factory=dict, description="what tells it from the others")


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


class SweepRowView(Reply):
    """One row: its job, and where that stands."""

    row: int
    job_id: str
    coordinates: dict[str, Any]
    status: JobStatus
    error: Problem | None = None


class SweepRows(Reply):
    """`GET /v1/sweeps/{id}/rows`: rows in their order."""

    items: tuple[SweepRowView, ...]
    next_row: int | None = Field(default=None, description="`first` of the next page; null in the last")


class SweepStates(Reply):
    """`GET /v1/sweeps/{id}/states`: a letter per row, in order: w, q, r, x (cancelling), s, f, c (cancelled)."""

    states: str
