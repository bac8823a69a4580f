"""The SHA-256 of a request's body, as its header `Content-Digest` gives it (RFC 9530)."""

import base64
import binascii
import re
from typing import Annotated

from fastapi import Depends, Header

from curvature_service.errors import ApiError

_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:,|$)", re.IGNORECASE)


def read_digest(
    content_digest: Annotated[
        str, Header(description="SHA-256 of the part's bytes, e.g. `sha-256=:<base64>:` (RFC 9530)")
    ] = "",
) -> str:
    """The SHA-256 in hexadecimal.

    Raises:
        ApiError: `invalid_request` if there is none.
    """
    found = _SHA256.search(content_digest)
    try:
        return base64.b64decode(found[1], validate=True).hex() if found else _refuse(content_digest)
    except binascii.Error:
        return _refuse(content_digest)


def _refuse(header: str) -> str:
    raise ApiError(
        "invalid_request",
        f"the header Content-Digest must give the part's SHA-256; it is {header[:100] or 'missing'}",
        param="Content-Digest",
        remedy="send Content-Digest: sha-256=:<base64 of the 32 bytes>: (RFC 9530)",
    )


DigestHeader = Annotated[str, Depends(read_digest)]
