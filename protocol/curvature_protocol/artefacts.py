"""Uploaded bytes, known by their SHA-256: model files, batch files and loss functions."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from curvature_protocol.base import Reply

ArtefactKind = Literal["models", "batches", "losses"]

SINGULAR: dict[ArtefactKind, str] = {"models": "model", "batches": "batch", "losses": "loss"}
"""One of a kind, in messages, fields and error codes (`model_not_found`)."""

SHA256_PATTERN = r"^[0-9a-f]{64}$"


class Artefact(Reply):
    """Metadata of one stored upload (its bytes are at `…/{sha256}/content`)."""

    sha256: str = Field(pattern=SHA256_PATTERN)
    kind: ArtefactKind
    size_bytes: int = Field(ge=0)
    created_at: datetime
    verified: bool = Field(
        default=True,
        description="false where the bytes went to the store itself: the first worker that fetches them hashes them",
    )
    pinned: bool = Field(default=False, description="whether age and size limits leave it alone")
