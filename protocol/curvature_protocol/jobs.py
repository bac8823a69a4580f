"""The life of a job.

(waiting ─►) queued ──► running ──► succeeded
                │  ▲       │ │ └───► failed ─► (retry) queued
                │  └───────┘ ▼
                │       cancelling ─► cancelled     (or succeeded / failed, if that came first)
                └──────────────────► cancelled

A running job goes back to the queue when its worker stops, falls silent, or fails for a passing reason. Only a job over
a data set waits: for its shards, one job per part; then it is queued to merge what they made.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from curvature_protocol.base import Reply
from curvature_protocol.errors import Problem
from curvature_protocol.results import Manifest


class JobStatus(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"  # its shards are being computed
    QUEUED = "queued"  # waits for a worker
    RUNNING = "running"  # a worker holds its lease
    CANCELLING = "cancelling"  # asked to stop; the worker has not confirmed yet
    SUCCEEDED = "succeeded"  # its result can be read
    FAILED = "failed"  # `error` says why and what to do
    CANCELLED = "cancelled"  # stopped before it had a result


class JobKind(StrEnum):
    """What a job makes."""

    ANALYSIS = "analysis"  # tensors: POST /v1/jobs
    SHARD = "shard"  # what one part of a data set adds to an analysis
    PLAN = "plan"  # what an analysis would do: POST /v1/plans
    INSPECTION = "inspection"  # what a model is: GET /v1/models/{sha256}


FINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class Progress(Reply):
    """How far a running job is."""

    phase: str = Field(description="fetching, admitting, loading, computing, merging, storing; shards (of a data set)")
    done: int = 0
    total: int = 0


class InlineResult(Reply):
    """A small result inside the job: the manifest, and each group's safetensors file in base64."""

    manifest: Manifest
    files: dict[str, str] = Field(default_factory=dict, description="label → base64 of its safetensors file")


class Job(Reply):
    """A job as the API shows it."""

    id: str
    kind: JobKind = JobKind.ANALYSIS
    status: JobStatus
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = 0
    priority: int = 5
    progress: Progress | None = None
    error: Problem | None = None
    warnings: tuple[str, ...] = ()
    metadata: dict[str, str] = Field(default_factory=dict)
    request: dict[str, Any] = Field(description="the request, an inline batch replaced by its hash")
    sweep: str | None = Field(default=None, description="id of the sweep that it belongs to")
    coordinates: dict[str, Any] | None = Field(default=None, description="what tells it from the sweep's other rows")
    parent: str | None = Field(default=None, description="of a shard: the job over the data set")
    parts: int | None = Field(default=None, description="of a job over a data set: how many shards it has")
    pinned: bool = Field(default=False, description="whether age and size limits leave it alone")
    result: InlineResult | None = Field(default=None, description="only in the reply to a waiting POST, when small")


class JobPage(Reply):
    """One page of `GET /v1/jobs`, newest first."""

    items: tuple[Job, ...]
    next_cursor: str | None = None
