"""Large uploads: begun, found again, and filled part by part."""

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import Artefact
from curvature_protocol.errors import Problem
from curvature_protocol.names import upload_key, upload_part_key
from curvature_protocol.uploads import MOST_UPLOAD_PARTS, PartAddress, Upload, UploadPart, UploadRequest
from curvature_service.artefacts.service import find_stored, mismatch, too_large
from curvature_service.delivery import ADDRESS_SECONDS
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_state import uploads
from curvature_state.uploads import NewUpload, UploadRecord

_MIB = 2**20


def begin(resources: Resources, tenant: str, request: UploadRequest) -> tuple[Upload, bool]:
    """The upload of these bytes, and whether it is new.

    Raises:
        ApiError: `payload_too_large`.
    """
    if request.size_bytes > resources.settings.max_upload_bytes:
        raise too_large(resources.settings.max_upload_bytes)
    if (artefact := find_stored(resources, request.kind, request.sha256)) is not None:
        return _nothing_to_do(resources, artefact), False
    while True:  # other clients may begin, finish or give up the same in between
        found = uploads.find_upload_of(resources.database, tenant, request.kind, request.sha256)
        if found is not None and not _can_go_on(resources, found, request):
            uploads.remove_upload(resources.database, resources.objects, found)
            found = None
        upload = found or _create(resources, tenant, request)
        if upload is None:
            continue
        uploads.touch_upload(resources.database, upload)
        try:
            return view(resources, upload), found is None
        except ApiError as error:
            if error.code != "upload_not_found":
                raise


def get(resources: Resources, tenant: str, upload_id: str) -> Upload:
    """Where an upload stands.

    Raises:
        ApiError: `upload_not_found`, or what it failed for.
    """
    return view(resources, find(resources, tenant, upload_id))


def find(resources: Resources, tenant: str, upload_id: str) -> UploadRecord:
    """The record of an upload that has not failed.

    Raises:
        ApiError: `upload_not_found`, or what it failed for.
    """
    found = uploads.find_upload(resources.database, tenant, upload_id)
    if found is None:
        raise gone(upload_id)
    if found.failure is not None:
        raise _told(found.failure)
    return found


def give_up(resources: Resources, tenant: str, upload_id: str) -> None:
    """Forget an upload and its parts; an artefact that came of it stays.

    Raises:
        ApiError: `upload_not_found`.
    """
    found = uploads.find_upload(resources.database, tenant, upload_id)
    if found is None:
        raise gone(upload_id)
    uploads.remove_upload(resources.database, resources.objects, found)


def view(resources: Resources, record: UploadRecord) -> Upload:
    """The record as the client sees it.

    Raises:
        ApiError: `upload_not_found` if the store has lost it.
    """
    artefact = find_stored(resources, record.kind, record.sha256) if record.finished else None
    return Upload(
        id=record.id,
        kind=record.kind,
        sha256=record.sha256,
        size_bytes=record.size_bytes,
        part_bytes=record.part_bytes,
        direct=record.store_id is not None,
        parts=() if record.finished else tuple(arrived(resources, record)),
        assembling=record.assembling,
        expires_at=record.expires_at,
        artefact=artefact,
    )


def arrived(resources: Resources, record: UploadRecord) -> list[UploadPart]:
    """The parts that have arrived whole.

    Raises:
        ApiError: `upload_not_found` if the store has lost the upload.
    """
    if record.store_id is None:
        return uploads.list_parts(resources.database, record.id)
    assert resources.objects.bucket is not None
    try:
        sent = resources.objects.bucket.sent_parts(upload_key(record.id), record.store_id)
    except FileNotFoundError:
        if resources.objects.head(upload_key(record.id)) == record.size_bytes:  # one object already
            return [UploadPart(number=n, size_bytes=record.size_of(n)) for n in range(1, record.count + 1)]
        uploads.remove_upload(resources.database, resources.objects, record)
        raise gone(record.id) from None
    # The store answers that it has taken a part; whether it has all of it shows here.
    return [
        UploadPart(number=part.number, size_bytes=part.size_bytes, sha256=part.sha256)
        for part in sent
        if part.number <= record.count and part.size_bytes == record.size_of(part.number)
    ]


def missing(record: UploadRecord, parts: list[UploadPart]) -> list[int]:
    """Numbers of the parts that have not arrived."""
    return sorted(set(range(1, record.count + 1)) - {part.number for part in parts})


async def store_part(
    resources: Resources, record: UploadRecord, number: int, sha256: str, chunks: AsyncIterator[bytes]
) -> tuple[UploadPart, bool]:
    """Store the bytes of one part; returns it, and whether it is new.

    Raises:
        ApiError: `hash_mismatch`, `invalid_request` for another size, `upload_not_found` if it was given up meanwhile.
    """
    check_number(record, number)
    part = UploadPart(number=number, size_bytes=record.size_of(number), sha256=sha256)
    if record.store_id is not None:
        raise _goes_elsewhere(record, number)
    known = await run_in_threadpool(uploads.find_part, resources.database, record.id, number)
    if record.finished or known == part:
        return part, False
    key = upload_part_key(record.id, number)
    await resources.objects.put_async_stream(key, _hashed(chunks, part))
    if not await run_in_threadpool(uploads.record_part, resources.database, record.id, part):
        await run_in_threadpool(resources.objects.delete, key)
        raise gone(record.id)
    return part, True


def sign_part(resources: Resources, record: UploadRecord, number: int, sha256: str) -> PartAddress:
    """Where the client sends a part itself.

    Raises:
        ApiError: `invalid_request` if parts of this upload come through the API.
    """
    check_number(record, number)
    if record.store_id is None or resources.direct is None:
        raise ApiError(
            "invalid_request",
            f"parts of upload {record.id} come through the API",
            param="number",
            remedy=f"PUT the part to /v1/uploads/{record.id}/parts/{number}",
        )
    uploads.touch_upload(resources.database, record)
    url, headers = resources.direct.sign_part(
        upload_key(record.id), record.store_id, number, record.size_of(number), sha256, ADDRESS_SECONDS
    )
    return PartAddress(number=number, url=url, headers=headers, expires_at=_from_now(ADDRESS_SECONDS))


def check_number(record: UploadRecord, number: int) -> None:
    """Refuse parts that the upload does not have.

    Raises:
        ApiError: `invalid_request`.
    """
    if not 1 <= number <= record.count:
        raise ApiError(
            "invalid_request",
            f"upload {record.id} has parts 1 to {record.count}; part {number} came",
            param="number",
            remedy=f"cut the {record.size_bytes} bytes into parts of {record.part_bytes}",
        )


def gone(upload_id: str) -> ApiError:
    """The refusal where there is no such upload."""
    return ApiError(
        "upload_not_found",
        f"there is no upload {upload_id!r} (any more)",
        param="upload_id",
        remedy="begin it again: POST /v1/uploads",
    )


async def _hashed(chunks: AsyncIterator[bytes], part: UploadPart) -> AsyncIterator[bytes]:
    """The chunks as they come; raises in place of an end that is not the part's."""
    digest, size = hashlib.sha256(), 0
    async for chunk in chunks:
        size += len(chunk)
        if size > part.size_bytes:
            raise _wrong_size(part, "more")
        if chunk:
            digest.update(chunk)
            yield chunk
    if size != part.size_bytes:
        raise _wrong_size(part, str(size))
    if digest.hexdigest() != part.sha256:
        raise mismatch(size, digest.hexdigest(), part.sha256 or "")


def _wrong_size(part: UploadPart, came: str) -> ApiError:
    return ApiError(
        "invalid_request",
        f"part {part.number} has {part.size_bytes} bytes; {came} came",
        param="number",
        remedy="send exactly the part's bytes",
    )


def _goes_elsewhere(record: UploadRecord, number: int) -> ApiError:
    return ApiError(
        "invalid_request",
        f"parts of upload {record.id} go to the store itself",
        param="number",
        remedy=f"POST /v1/uploads/{record.id}/parts/{number} gives the address; or begin the upload with direct=false",
    )


def _can_go_on(resources: Resources, found: UploadRecord, request: UploadRequest) -> bool:
    """Whether what was begun is of use to this client."""
    lost = found.finished  # else the artefact would have been found
    usable = request.direct and resources.direct is not None
    reachable = found.store_id is None or usable or found.assembling  # then, nothing needs to be sent
    return found.size_bytes == request.size_bytes and found.failure is None and not lost and reachable


def _create(resources: Resources, tenant: str, request: UploadRequest) -> UploadRecord | None:
    part_bytes = resources.settings.upload_part_bytes
    smallest = -(-request.size_bytes // MOST_UPLOAD_PARTS)
    part_bytes = max(part_bytes, -(-smallest // _MIB) * _MIB)
    new = NewUpload(tenant, request.kind, request.sha256, request.size_bytes, part_bytes)
    upload_id = uploads.new_upload_id()
    if resources.direct is None or not request.direct:
        return uploads.create_upload(resources.database, new, upload_id, None)
    store_id = resources.direct.begin(upload_key(upload_id))
    created = uploads.create_upload(resources.database, new, upload_id, store_id)
    if created is None:
        resources.direct.abort(upload_key(upload_id), store_id)
    return created


def _nothing_to_do(resources: Resources, artefact: Artefact) -> Upload:
    return Upload(
        id=None,
        kind=artefact.kind,
        sha256=artefact.sha256,
        size_bytes=artefact.size_bytes,
        part_bytes=resources.settings.upload_part_bytes,
        artefact=artefact,
    )


def _told(failure: Problem) -> ApiError:
    return ApiError(failure.code, failure.detail, param=failure.param, remedy=failure.remedy)


def _from_now(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
