"""Uploads: streamed to the store, which keeps them only if the hash is right."""

import hashlib
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_state.artefacts import find_artefact, record_artefact, use_artefact


async def store_upload(
    resources: Resources, kind: ArtefactKind, sha256: str, chunks: AsyncIterator[bytes]
) -> tuple[Artefact, bool]:
    """Store the bytes that `chunks` yields; returns the record and whether it is new.

    Raises:
        ApiError: `payload_too_large` as soon as the limit is passed, `hash_mismatch` at the end.
    """
    known = await run_in_threadpool(find_stored, resources, kind, sha256, used=True)
    if known is not None and known.verified:
        return known, False
    size = await store_hashed(resources, artefact_key(kind, sha256), sha256, chunks)
    recorded = await run_in_threadpool(record_artefact, resources.database, kind, sha256, size)
    await run_in_threadpool(check_there, resources, recorded)
    return recorded, known is None


async def store_hashed(resources: Resources, key: str, sha256: str, chunks: AsyncIterator[bytes]) -> int:
    """Store what `chunks` yields if it is what the hash says, else nothing; returns its size.

    Raises:
        ApiError: `payload_too_large`, `hash_mismatch`.
    """
    limit = resources.settings.max_upload_bytes
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
        # Here, and not when all is written: a source that fails leaves nothing, so that no wrong bytes get the key.
        if digest.hexdigest() != sha256:
            raise mismatch(size, digest.hexdigest(), sha256)

    return await resources.objects.put_async_stream(key, hashed(), limit)


def mismatch(size: int, found: str, sha256: str) -> ApiError:
    """The refusal of bytes that are not those of their hash."""
    return ApiError(
        "hash_mismatch",
        f"the {size} bytes that came have the SHA-256 {found}, not {sha256}",
        param="sha256",
        remedy="the upload was damaged or cut off: send it again",
    )


def check_there(resources: Resources, artefact: Artefact) -> None:
    """See that an upload's bytes were not removed before it had its record.

    Raises:
        ApiError: `unavailable`.
    """
    if resources.objects.head(artefact_key(artefact.kind, artefact.sha256)) is None:
        raise ApiError(
            "unavailable", "the same upload was being removed at this moment", param="sha256", remedy="send it again"
        )


def too_large(limit: int) -> ApiError:
    """The refusal of an upload beyond the limit."""
    return ApiError(
        "payload_too_large",
        f"uploads may have {limit} bytes; more came",
        remedy="send fewer samples at once, or ask the operator to raise CURVATURE_MAX_UPLOAD_BYTES",
    )


def store_small(resources: Resources, kind: ArtefactKind, sha256: str, data: bytes) -> Artefact:
    """Store bytes that are in memory already, and of which `sha256` is the hash."""
    known = find_stored(resources, kind, sha256, used=True)
    if known is not None and known.verified:
        return known
    key = artefact_key(kind, sha256)
    while True:
        resources.objects.put_bytes(key, data)
        recorded = record_artefact(resources.database, kind, sha256, len(data))
        if resources.objects.head(key) is not None:  # not removed before it had its record
            return recorded


def find_stored(resources: Resources, kind: ArtefactKind, sha256: str, *, used: bool = False) -> Artefact | None:
    """The upload's record, if its bytes are there too: what was lost from the store can be uploaded again.

    Where it is `used`, somebody is about to ask for it in a job.
    """
    find = use_artefact if used else find_artefact
    found = find(resources.database, kind, sha256)
    if found is None or resources.objects.head(artefact_key(kind, sha256)) != found.size_bytes:
        return None
    return found


def get_artefact(resources: Resources, kind: ArtefactKind, sha256: str, *, param: str | None = None) -> Artefact:
    """The upload's record; `param` is the request's field that names it, if not the kind's own.

    Raises:
        ApiError: `model_not_found`, `batch_not_found` or `loss_not_found`.
    """
    found = find_stored(resources, kind, sha256)
    if found is None:
        what = SINGULAR[kind]
        raise ApiError(
            f"{what}_not_found",
            f"no {what} with the SHA-256 {sha256} is stored",
            param=param or what,
            remedy=f"PUT its bytes to /v1/{kind}/{sha256}",
        )
    return found
