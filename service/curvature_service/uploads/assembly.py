"""The parts of an upload put together, by one API process at a time, however long that takes.

The process holds the upload by a lease. A client whose request ends earlier asks again: here or at another process it
finds the work going on, or done, or, if the process died, takes care that another one begins it anew.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.errors import Problem
from curvature_protocol.names import artefact_key, upload_key, upload_part_key
from curvature_service.artefacts.service import check_there, find_stored, mismatch
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_service.uploads.service import arrived, find, missing
from curvature_state import uploads
from curvature_state.artefacts import announce_artefact, find_artefact, forget_artefact, record_artefact
from curvature_state.jobs import problem
from curvature_state.s3 import SentPart
from curvature_state.uploads import UploadRecord

logger = logging.getLogger("curvature.service")

_RENEW_SECONDS = uploads.ASSEMBLY_LEASE_SECONDS / 5
_LOOK_SECONDS = 0.25
_MOST_NAMED = 20


async def complete(resources: Resources, tenant: str, upload_id: str, wait_seconds: float) -> UploadRecord:
    """Put the parts together, or wait for whoever does; the record as it is when that is done or the wait is over.

    Raises:
        ApiError: `upload_incomplete`, `hash_mismatch`, `upload_not_found`.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_seconds
    while True:
        record = await run_in_threadpool(find, resources, tenant, upload_id)
        if not record.finished and not record.assembling:
            await run_in_threadpool(_check_whole, resources, record)
            if not await run_in_threadpool(uploads.claim_assembly, resources.database, upload_id):
                continue  # somebody else was quicker
            task = asyncio.create_task(_assemble(resources, record))
            resources.background.add(task)
            task.add_done_callback(lambda done: _settle(resources, done))
            await asyncio.wait({task}, timeout=deadline - clock())
            if task.done():
                await task
            return await run_in_threadpool(find, resources, tenant, upload_id)
        if record.finished or clock() >= deadline:
            return record
        await asyncio.sleep(_LOOK_SECONDS)


def _settle(resources: Resources, task: "asyncio.Task[None]") -> None:
    """Let go of a task; that it failed is in the record, and told to whoever asks."""
    resources.background.discard(task)
    if not task.cancelled():
        task.exception()


def _check_whole(resources: Resources, record: UploadRecord) -> None:
    absent = missing(record, arrived(resources, record))
    if absent:
        named = ", ".join(map(str, absent[:_MOST_NAMED])) + (", …" if len(absent) > _MOST_NAMED else "")
        raise ApiError(
            "upload_incomplete",
            f"{len(absent)} of the {record.count} parts are missing: {named}",
            param="upload_id",
            remedy=f"send them; GET /v1/uploads/{record.id} lists those that have arrived",
        )


async def _assemble(resources: Resources, record: UploadRecord) -> None:
    """Make an artefact of the parts, or write down why it cannot be made.

    Raises:
        ApiError: why.
    """
    database = resources.database
    failure: Problem | None = None
    try:
        async with _renewed(resources, record):
            if record.store_id is None:
                await _join(resources, record)
            else:
                await run_in_threadpool(_place, resources, record)
        await run_in_threadpool(uploads.finish_upload, database, record.id)
    except ApiError as error:
        if error.code == "hash_mismatch":  # nobody knows which part is wrong: all of it is sent again
            failure = problem(error.code, error.detail, param=error.param, remedy=error.remedy)
        uploads.release_assembly(database, record.id, failure)
        raise
    except BaseException as error:  # also when the process ends: another one need not wait for the lease to run out
        if not isinstance(error, asyncio.CancelledError):
            logger.error("upload %s could not be put together: %s", record.id, error)
        with suppress(Exception):
            uploads.release_assembly(database, record.id)
        raise
    await run_in_threadpool(uploads.remove_upload_bytes, resources.objects, record)


@asynccontextmanager
async def _renewed(resources: Resources, record: UploadRecord) -> AsyncIterator[None]:
    """Keep the lease."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                await run_in_threadpool(uploads.renew_assembly, resources.database, record.id)
            except Exception:
                logger.exception("the lease of upload %s could not be renewed", record.id)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# Parts that came through the API


async def _join(resources: Resources, record: UploadRecord) -> None:
    """Copy the parts into one object, hashing what is copied; other bytes than the hash says are not stored."""

    async def joined() -> AsyncIterator[memoryview]:
        digest = hashlib.sha256()
        for number in range(1, record.count + 1):
            async for piece in _read_part(resources, record, number):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != record.sha256:
            raise mismatch(record.size_bytes, digest.hexdigest(), record.sha256)

    key = artefact_key(record.kind, record.sha256)
    await resources.objects.put_async_stream(key, joined(), record.size_bytes)
    recorded = await run_in_threadpool(
        record_artefact, resources.database, record.kind, record.sha256, record.size_bytes
    )
    await run_in_threadpool(check_there, resources, recorded)


async def _read_part(resources: Resources, record: UploadRecord, number: int) -> AsyncIterator[memoryview]:
    try:
        async for piece in resources.objects.async_stream(
            upload_part_key(record.id, number), 0, record.size_of(number)
        ):
            yield piece
    except FileNotFoundError:
        await run_in_threadpool(uploads.forget_part, resources.database, record.id, number)
        raise ApiError(
            "upload_incomplete",
            f"part {number} was lost from the store",
            param="upload_id",
            remedy="send it again",
        ) from None


# Parts that went to the store itself


def _place(resources: Resources, record: UploadRecord) -> None:
    """Make one object of the parts and give it the artefact's place, unless that is taken.

    Nobody has hashed these bytes. Verified ones are never replaced by them: the record comes first, and whoever brings
    verified bytes before they have moved leaves it unverified.
    """
    objects, key = resources.objects, upload_key(record.id)
    bucket = objects.bucket
    assert bucket is not None
    assert record.store_id is not None
    parts = [part for part in _sent(resources, record) if part.number <= record.count]
    if parts:
        bucket.finish(key, record.store_id, parts)
    if (size := objects.head(key)) != record.size_bytes:
        raise ApiError(
            "hash_mismatch",
            f"the store has {size or 0} bytes of the {record.size_bytes} that were sent to it",
            param="sha256",
            remedy="send them again",
        )
    if _take_place(resources, record):
        objects.move(key, artefact_key(record.kind, record.sha256))


def _sent(resources: Resources, record: UploadRecord) -> list[SentPart]:
    """The parts; none if they are one object already."""
    bucket = resources.objects.bucket
    assert bucket is not None
    assert record.store_id is not None
    try:
        return bucket.sent_parts(upload_key(record.id), record.store_id)
    except FileNotFoundError:
        return []


def _take_place(resources: Resources, record: UploadRecord) -> bool:
    """Record the artefact; False if its bytes are there already."""
    while not announce_artefact(resources.database, record.kind, record.sha256, record.size_bytes):
        if find_stored(resources, record.kind, record.sha256) is not None:
            return False
        lost = find_artefact(resources.database, record.kind, record.sha256)
        if lost is not None:
            forget_artefact(resources.database, lost)
    return True
