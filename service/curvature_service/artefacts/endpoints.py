"""`/v1/models` and `/v1/batches`."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from curvature_protocol.artefacts import SHA256_PATTERN, Artefact, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_service.artefacts.service import get_artefact, store_upload, too_large
from curvature_service.openapi import problems
from curvature_service.ranges import stream_object
from curvature_service.resources import ResourcesDependency

Sha256Path = Annotated[
    str,
    Path(
        pattern=SHA256_PATTERN,
        description="SHA-256 of the bytes, in lower-case hexadecimal",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    ),
]


def artefact_router(kind: ArtefactKind) -> APIRouter:
    """The endpoints of one kind of upload."""
    router = APIRouter(prefix=f"/{kind}", tags=[kind])
    what = "model file" if kind == "models" else "batch (a safetensors file)"
    body = {
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    }

    @router.put(
        "/{sha256}",
        summary=f"Upload a {what}",
        description="Streamed and hashed on the way. 201 if new, 200 if the server had it.",
        response_model=Artefact,
        status_code=201,
        responses={200: {"model": Artefact, "description": "It was there already"}, **problems(400, 413)},
        openapi_extra=body,
    )
    async def put(sha256: Sha256Path, request: Request, response: Response, resources: ResourcesDependency) -> Artefact:
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > resources.settings.max_upload_bytes:
            raise too_large(resources.settings.max_upload_bytes)
        artefact, new = await store_upload(resources, kind, sha256, request.stream())
        response.status_code = 201 if new else 200
        return artefact

    @router.head("/{sha256}", include_in_schema=False)
    @router.get(
        "/{sha256}",
        summary=f"Metadata of an uploaded {what}",
        response_model=Artefact,
        responses=problems(404),
    )
    async def get(sha256: Sha256Path, resources: ResourcesDependency) -> Artefact:
        return await get_artefact(resources, kind, sha256)

    @router.head("/{sha256}/content", include_in_schema=False)
    @router.get(
        "/{sha256}/content",
        summary=f"Bytes of an uploaded {what}",
        description="Single HTTP ranges are honoured.",
        response_class=Response,
        responses={
            200: {"content": {"application/octet-stream": {}}},
            206: {"description": "The range asked for"},
            **problems(404, 416),
        },
    )
    async def content(sha256: Sha256Path, request: Request, resources: ResourcesDependency) -> Response:
        artefact = await get_artefact(resources, kind, sha256)
        return stream_object(
            request,
            resources.objects,
            artefact_key(kind, sha256),
            artefact.size_bytes,
            etag=sha256,
            media_type="application/octet-stream",
        )

    return router
