"""The tables."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Float,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
    true,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# Conditions of partial indexes. Only a query that repeats one word for word is served by its index.
TO_TELL = "webhook_waits AND status IN ('succeeded', 'failed', 'cancelled')"
UNFINISHED_IN_SWEEP = "sweep_id IS NOT NULL AND status NOT IN ('succeeded', 'failed', 'cancelled')"
OF_SWEEP = "subject = 'sweep'"


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, always with its zone (SQLite forgets it)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Common base of all tables."""


class JobRow(Base):
    """A job. `attempt` counts claims, `handed_back` those of them that do not count as failed attempts.

    The lease names who holds the job and until when. A job over a data set has one job per part, a shard, that names it
    as its `parent`; a sweep's jobs name the sweep, and their row in it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant", "idempotency_key"),
        Index("jobs_by_age", "created_at", "id"),
        Index("jobs_by_status", "status", "created_at"),
        Index("jobs_by_tenant", "tenant", "kind", "created_at", "id"),
        # Whose turn it is, found without reading the queue. The condition is spelled out in the query, too.
        Index(
            "jobs_by_turn",
            "tenant",
            "turn",
            "created_at",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index("jobs_by_sweep", "sweep_id", "sweep_row"),
        Index(
            "jobs_unfinished_in_sweep",
            "sweep_id",
            sqlite_where=text(UNFINISHED_IN_SWEEP),
            postgresql_where=text(UNFINISHED_IN_SWEEP),
        ),
        Index("jobs_to_tell", "status", sqlite_where=text(TO_TELL), postgresql_where=text(TO_TELL)),
        Index("jobs_by_parent", "parent_id", "part"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), default="default")
    kind: Mapped[str] = mapped_column(String(16), default="analysis", server_default="analysis")
    status: Mapped[str] = mapped_column(String(16))
    priority: Mapped[int] = mapped_column(Integer, default=5)
    turn: Mapped[int] = mapped_column(Integer, default=4, server_default="4")
    """9 − priority: an index in the order in which jobs are taken up has no column that falls."""
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_digest: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    handed_back: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    lease_owner: Mapped[str | None] = mapped_column(String(255))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    rung_at: Mapped[datetime] = mapped_column(UtcDateTime)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    warnings: Mapped[list[str]] = mapped_column(JSON, default=list)
    details: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    """The user's metadata (`metadata` is a reserved name)."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """A queued job that failed for a passing reason waits until then."""
    requires_gpu: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    requires_tag: Mapped[str | None] = mapped_column(String(64))
    requires_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Memory that a worker must have: asked for, estimated by a plan, or learned when it ran out."""
    worker_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")
    """Of all attempts that are over."""
    sweep_id: Mapped[str | None] = mapped_column(String(32))
    sweep_row: Mapped[int | None] = mapped_column(Integer)
    coordinates: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What tells this row of the sweep from the others."""
    parent_id: Mapped[str | None] = mapped_column(String(32))
    part: Mapped[int | None] = mapped_column(Integer)
    parts: Mapped[int | None] = mapped_column(Integer)
    """Of a job over a data set: how many shards it has,"""
    parts_left: Mapped[int | None] = mapped_column(Integer)
    """and how many of them have not succeeded."""
    pinned: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    result_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """What the winning attempt stored; None where nothing is stored (any more)."""
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the result was last read, to the minute."""
    webhook_waits: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """A webhook waits for its end."""


class ArtefactRow(Base):
    """An upload; only what stands here exists.

    Its bytes were hashed and found right, unless it is not `verified`: then they went to the store directly, and the
    first worker that fetches them hashes them.
    """

    __tablename__ = "artefacts"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When a job last asked for it, to the minute."""
    pinned: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    verified: Mapped[bool] = mapped_column(Boolean, default=True, server_default=true())


class JobArtefactRow(Base):
    """A job refers to an upload."""

    __tablename__ = "job_artefacts"
    __table_args__ = (Index("job_artefacts_by_artefact", "kind", "sha256"),)

    job_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)


class ResultUseRow(Base):
    """A job's result consists in part of files that another job stored: from the cache, or of its shards."""

    __tablename__ = "result_uses"
    __table_args__ = (Index("result_uses_by_source", "source_id"),)

    job_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    source_id: Mapped[str] = mapped_column(String(32), primary_key=True)


class RemovalRow(Base):
    """What the records do not name any more, and whose bytes are to go from the store.

    A result's stay for as long as another job's result refers to them.
    """

    __tablename__ = "removals"

    what: Mapped[str] = mapped_column(String(16), primary_key=True)
    """"result", a kind of upload, or "sweep" (whose jobs are to go)."""
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The job's or the sweep's id, or the upload's SHA-256."""
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Of a result whose job is still there; 0: all that the job stored."""
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    removed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ModelDigestRow(Base):
    """The canonical digest of a model file's program and parameters, as one version of the engine computed it."""

    __tablename__ = "model_digests"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    eval: Mapped[bool] = mapped_column(Boolean, primary_key=True)
    """Whether it was loaded in eval mode: a file saved in training mode is another model otherwise."""
    engine_version: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))


class CachedResultRow(Base):
    """Where a quantity computed before is stored: a label of a job's result."""

    __tablename__ = "cached_results"
    __table_args__ = (Index("cached_results_by_job", "job_id"),)

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(32))
    attempt: Mapped[int] = mapped_column(Integer)
    label: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class SweepRow(Base):
    """Jobs submitted together; where they stand, their own rows say."""

    __tablename__ = "sweeps"
    __table_args__ = (UniqueConstraint("tenant", "idempotency_key"), Index("sweeps_by_age", "created_at", "id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_digest: Mapped[str] = mapped_column(String(64))
    total: Mapped[int] = mapped_column(Integer)
    axes: Mapped[list[str]] = mapped_column(JSON)
    """Names of the coordinates that its rows have."""
    details: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class UploadRow(Base):
    """A large upload on its way, part by part; a day longer than that if it succeeded."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("tenant", "kind", "sha256"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int] = mapped_column(BigInteger)
    store_id: Mapped[str | None] = mapped_column(Text)
    """The store's own name of a multipart upload whose parts go to it directly."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    touched_at: Mapped[datetime] = mapped_column(UtcDateTime)
    assembling_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Whoever puts the parts together renews it."""
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    failure: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """The problem for which it came to nothing."""


class UploadPartRow(Base):
    """One part of an upload through the API, stored and hashed."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    """From 1, as S3 counts."""
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class WebhookRow(Base):
    """A message to be sent when a job or a sweep is over."""

    __tablename__ = "webhooks"
    __table_args__ = (
        Index("webhooks_by_turn", "state", "next_at"),
        Index("webhooks_by_subject", "subject_id"),
        Index("webhooks_of_sweeps", "state", sqlite_where=text(OF_SWEEP), postgresql_where=text(OF_SWEEP)),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(8))
    """"job" or "sweep"."""
    subject_id: Mapped[str] = mapped_column(String(32))
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    """waiting (for its subject's end), due (to be sent, or sent again, at `next_at`), delivered, failed."""
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[datetime] = mapped_column(UtcDateTime)
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class TenantRow(Base):
    """Who jobs belong to, its share of the workers, and its limits."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    weight: Mapped[float] = mapped_column(Float, default=1.0, server_default="1")
    max_queued: Mapped[int | None] = mapped_column(Integer)
    max_running: Mapped[int | None] = mapped_column(Integer)
    virtual_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")
    """Worker seconds used, divided by the weight; lifted to the others' when the tenant comes back to the queue."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ApiKeyRow(Base):
    """An API key, known by its SHA-256 alone."""

    __tablename__ = "api_keys"
    __table_args__ = (UniqueConstraint("sha256"),)

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """The key's public beginning."""
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(255))
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class WorkerRow(Base):
    """A worker as it last published itself; `draining` is what an operator wants of it."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    name: Mapped[str | None] = mapped_column(String(255))
    memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """What one analysis may take; 0 where it is not known."""
    tags: Mapped[list[str] | None] = mapped_column(JSON)
    draining: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    device: Mapped[str] = mapped_column(String(32))
    engine_version: Mapped[str] = mapped_column(String(32))
    isolation: Mapped[str] = mapped_column(String(128))
    catalogue: Mapped[dict[str, Any]] = mapped_column(JSON)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
