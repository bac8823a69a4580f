"""Uploads: streamed to the store under a temporary key, made visible only when the hash is right."""

import hashlib
import uuid
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_state.artefacts import find_artefact, record_artefact

UPLOADS = "uploads"


async def store_upload(
    resources: Resources, kind: ArtefactKind, sha256: str, chunks: AsyncIterator[bytes], limit: int | None = None
) -> tuple[Artefact, bool]:
    """Store the bytes that `chunks` yields; returns the record and whether it is new.

    Raises:
        ApiError: `payload_too_large` as soon as the limit is passed, `hash_mismatch` at the end.
    """
    known = await run_in_threadpool(find_artefact, resources.database, kind, sha256)
    if known is not None:
        return known, False
    limit = resources.settings.max_upload_bytes if limit is None else limit
    digest = hashlib.sha256()

    async def hashed() -> AsyncIterator[bytes]:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            digest.update(chunk)
            if chunk:
                yield chunk

    temporary = f"{UPLOADS}/{uuid.uuid4().hex}"
    try:
        size = await resources.objects.put_async_stream(temporary, hashed())
        if digest.hexdigest() != sha256:
            raise ApiError(
                "hash_mismatch",
                f"the bytes that came have the SHA-256 {digest.hexdigest()}, not {sha256}",
                param="sha256",
                remedy="the upload was damaged or cut off: send it again",
            )
        await run_in_threadpool(resources.objects.move, temporary, artefact_key(kind, sha256))
    except BaseException:
        await run_in_threadpool(resources.objects.delete, temporary)
        raise
    return await run_in_threadpool(record_artefact, resources.database, kind, sha256, size), True


def too_large(limit: int) -> ApiError:
    """The refusal of an upload beyond the limit."""
    return ApiError(
        "payload_too_large",
        f"uploads may have {limit} bytes; more came",
        remedy="send fewer samples at once, or ask the operator to raise CURVATURE_MAX_UPLOAD_BYTES",
    )


async def get_artefact(resources: Resources, kind: ArtefactKind, sha256: str) -> Artefact:
    """The upload's record.

    Raises:
        ApiError: `model_not_found` or `batch_not_found`.
    """
    found = await run_in_threadpool(find_artefact, resources.database, kind, sha256)
    if found is None:
        what = "model" if kind == "models" else "batch"
        raise ApiError(
            f"{what}_not_found",
            f"no {what} with the SHA-256 {sha256} was uploaded",
            param=what,
            remedy=f"PUT its bytes to /v1/{kind}/{sha256}",
        )
    return found
