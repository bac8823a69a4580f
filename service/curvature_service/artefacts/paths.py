"""The paths of uploads."""

from typing import Annotated

from fastapi import Path

from curvature_protocol.artefacts import SHA256_PATTERN
from curvature_service import examples

Sha256Path = Annotated[
    str,
    Path(
        pattern=SHA256_PATTERN,
        description="SHA-256 of the bytes, in lower-case hexadecimal",
        examples=[examples.MODEL_SHA256],
    ),
]
