"""What the server says of itself."""

from datetime import datetime
from typing import Any

from pydantic import Field

from curvature_protocol.base import Reply


class WorkerView(Reply):
    """A worker as it last published itself."""

    id: str
    device: str
    engine_version: str
    isolation: str
    seen_at: datetime
    name: str = Field(default="", description="the operator's name for it")
    memory_bytes: int = Field(default=0, description="what one analysis may take; 0: not known")
    tags: tuple[str, ...] = ()
    job: str | None = Field(default=None, description="id of the job that it is busy with")
    draining: bool = Field(default=False, description="whether it takes no more jobs")


class Health(Reply):
    """`GET /v1/health`: the process answers."""

    status: str = "ok"
    version: str
    workers: tuple[WorkerView, ...] = ()
    limits: dict[str, Any] = Field(
        default_factory=dict, description="upload_bytes, inline_batch_bytes, inline_result_bytes"
    )


class Readiness(Reply):
    """`GET /v1/ready`: each thing the server needs, and whether it answers (503 if one does not)."""

    ready: bool
    checks: dict[str, str] = Field(description='database, storage, broker, worker → "ok" or what is wrong')
