"""`/v1/uploads`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.uploads import PartAddress, Upload, UploadPart, UploadRequest
from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.bodies import read_json
from curvature_service.openapi import BYTES, answer, json_body, problems
from curvature_service.resources import ResourcesDependency
from curvature_service.uploads import assembly, service
from curvature_service.uploads.digests import DigestHeader

router = APIRouter(prefix="/uploads", tags=["uploads"])

_REQUEST_BYTES = 2**12
_WAIT_SECONDS = 20.0

UploadIdPath = Annotated[str, Path(description="The upload's id", examples=[examples.UPLOAD_ID])]
NumberPath = Annotated[int, Path(description="The part's number, from 1", examples=[1])]


async def read_upload_request(request: Request) -> UploadRequest:
    """The body."""
    return await read_json(request, UploadRequest, _REQUEST_BYTES, "send kind, sha256 and size_bytes alone")


@router.post(
    "",
    summary="Begin a large upload, or find it again",
    description="There is one upload per kind and hash: after a broken connection, or in another process, the same "
    "request tells which parts have arrived. `artefact` is there if nothing needs to be uploaded.",
    status_code=201,
    responses={
        **answer(201, "Begun", examples.UPLOAD),
        200: {
            "model": Upload,
            "description": "Under way, or not needed",
            "content": {
                "application/json": {
                    "examples": {
                        "under way": {"summary": "One part has arrived", "value": examples.UPLOAD},
                        "not needed": {"summary": "The server has it", "value": examples.KNOWN_UPLOAD},
                    }
                }
            },
        },
        **problems("payload_too_large"),
    },
    openapi_extra=json_body(UploadRequest, examples.UPLOAD_REQUEST),
)
async def begin_upload(
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    body: Annotated[UploadRequest, Depends(read_upload_request)],
) -> Upload:
    """Find or write the record."""
    upload, new = await run_in_threadpool(service.begin, resources, tenant, body)
    response.status_code = 201 if new else 200
    return upload


@router.get(
    "/{upload_id}",
    summary="Where an upload stands",
    description="Its parts, or, for a day after its end, what came of it.",
    responses={**answer(200, "The upload", examples.UPLOAD), **problems("upload_not_found")},
)
async def get_upload(upload_id: UploadIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Upload:
    """Its parts, or what came of it."""
    return await run_in_threadpool(service.get, resources, tenant, upload_id)


@router.put(
    "/{upload_id}/parts/{number}",
    summary="Send one part",
    description="Streamed and hashed on the way; in any order, several at once, and again without harm. 201 if new, "
    "200 if it had arrived.",
    status_code=201,
    responses={
        **answer(201, "Stored", examples.UPLOAD_PART),
        **answer(200, "It was there already", examples.UPLOAD_PART, UploadPart),
        **problems("hash_mismatch", "upload_not_found"),
    },
    openapi_extra={"requestBody": {"required": True, "content": BYTES}},
)
async def put_part(
    upload_id: UploadIdPath,
    number: NumberPath,
    sha256: DigestHeader,
    request: Request,
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
) -> UploadPart:
    """Stream it to the store."""
    record = await run_in_threadpool(service.find, resources, tenant, upload_id)
    part, new = await service.store_part(resources, record, number, sha256, request.stream())
    response.status_code = 201 if new else 200
    return part


@router.post(
    "/{upload_id}/parts/{number}",
    summary="Where to send one part of a direct upload",
    description="An address of the store itself, for one PUT of exactly the bytes of this hash.",
    responses={**answer(200, "The address", examples.PART_ADDRESS), **problems("upload_not_found")},
)
async def sign_part(
    upload_id: UploadIdPath,
    number: NumberPath,
    sha256: DigestHeader,
    resources: ResourcesDependency,
    tenant: TenantDependency,
) -> PartAddress:
    """Sign an address."""
    record = await run_in_threadpool(service.find, resources, tenant, upload_id)
    return await run_in_threadpool(service.sign_part, resources, record, number, sha256)


@router.post(
    "/{upload_id}/complete",
    summary="Put the parts together",
    description="Answers when that is done (`artefact` is there), or after `wait` seconds with 202: ask again then. "
    "Repeating it does no harm.",
    responses={
        **answer(200, "It is there", examples.FINISHED_UPLOAD),
        **answer(202, "The parts are still being put together", examples.ASSEMBLING_UPLOAD, Upload),
        **problems("hash_mismatch", "upload_not_found", "upload_incomplete"),
    },
)
async def complete_upload(
    upload_id: UploadIdPath,
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    wait: Annotated[float, Query(ge=0, description="seconds to wait for it, at most")] = _WAIT_SECONDS,
) -> Upload:
    """Assemble and verify."""
    seconds = min(wait, resources.settings.max_wait_seconds)
    record = await assembly.complete(resources, tenant, upload_id, seconds)
    upload = await run_in_threadpool(service.view, resources, record)
    response.status_code = 202 if upload.assembling else 200
    return upload


@router.delete(
    "/{upload_id}",
    summary="Give an upload up",
    description="Removes its parts. What was uploaded whole stays.",
    status_code=204,
    responses={204: {"description": "It is gone"}, **problems("upload_not_found")},
)
async def delete_upload(upload_id: UploadIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> None:
    """Forget it."""
    await run_in_threadpool(service.give_up, resources, tenant, upload_id)
