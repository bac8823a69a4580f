"""Large uploads, part by part: what a client asks for, and where an upload stands."""

from datetime import datetime

from pydantic import Field

from curvature_protocol.artefacts import SHA256_PATTERN, Artefact, ArtefactKind
from curvature_protocol.base import Message, Reply

MOST_UPLOAD_PARTS = 10_000
"""S3's limit; larger uploads have larger parts."""


class UploadRequest(Message):
    """Begin an upload, or find the one under way: there is one per tenant, kind and hash."""

    kind: ArtefactKind
    sha256: str = Field(pattern=SHA256_PATTERN, description="of the whole")
    size_bytes: int = Field(ge=1)
    direct: bool = Field(
        default=True, description="whether parts may be asked to go to the store itself; false if it cannot be reached"
    )


class UploadPart(Reply):
    """A part that has arrived."""

    number: int = Field(ge=1)
    size_bytes: int
    sha256: str | None = Field(default=None, description="null where it went to a store that keeps no checksums")


class Upload(Reply):
    """Where an upload stands. All parts but the last have `part_bytes`; it is over when there is an `artefact`."""

    id: str | None = Field(default=None, description="null if nothing needs to be uploaded")
    kind: ArtefactKind
    sha256: str
    size_bytes: int
    part_bytes: int
    direct: bool = Field(default=False, description="whether parts go to the store itself, each to its own address")
    parts: tuple[UploadPart, ...] = Field(default=(), description="those that have arrived")
    assembling: bool = Field(default=False, description="whether the parts are being put together")
    expires_at: datetime | None = Field(default=None, description="when it is given up if nothing comes any more")
    artefact: Artefact | None = Field(default=None, description="what was uploaded, once it is there")


class PartAddress(Reply):
    """Where one part of a direct upload goes: a PUT with these headers, and without the API key."""

    number: int
    url: str
    headers: dict[str, str]
    expires_at: datetime
