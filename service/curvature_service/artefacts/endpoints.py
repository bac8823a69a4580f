"""`/v1/models`, `/v1/batches` and `/v1/losses`."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_service import examples
from curvature_service.artefacts.paths import Sha256Path
from curvature_service.artefacts.service import get_artefact, store_upload, too_large
from curvature_service.delivery import Direct, deliver_object
from curvature_service.models.endpoints import add_inspected_model
from curvature_service.openapi import BYTES, RANGE_HEADER, REDIRECT, answer, problems
from curvature_service.resources import ResourcesDependency
from curvature_service.retention.endpoints import add_retention

_WHAT: dict[ArtefactKind, str] = {
    "models": "model file",
    "batches": "batch (a safetensors file)",
    "losses": "loss function (a TorchScript file)",
}


def artefact_router(kind: ArtefactKind) -> APIRouter:
    """The endpoints of one kind of upload; models have more to their record."""
    router = APIRouter(prefix=f"/{kind}", tags=[kind])
    _add_upload(router, kind)
    if kind == "models":
        add_inspected_model(router)
    else:
        _add_metadata(router, kind)
    _add_content(router, kind)
    add_retention(router, kind)
    return router


def _add_upload(router: APIRouter, kind: ArtefactKind) -> None:
    @router.put(
        "/{sha256}",
        summary=f"Upload a {_WHAT[kind]}",
        description="Streamed and hashed on the way. 201 if new, 200 if the server had it.",
        response_model=Artefact,
        status_code=201,
        responses={
            **answer(201, "Stored", examples.ARTEFACT[kind]),
            **answer(200, "It was there already", examples.ARTEFACT[kind], Artefact),
            **problems("hash_mismatch", "payload_too_large"),
        },
        openapi_extra={"requestBody": {"required": True, "content": BYTES}},
    )
    async def put(sha256: Sha256Path, request: Request, response: Response, resources: ResourcesDependency) -> Artefact:
        announced = request.headers.get("content-length")
        if announced is not None and int(announced) > resources.settings.max_upload_bytes:
            raise too_large(resources.settings.max_upload_bytes)
        artefact, new = await store_upload(resources, kind, sha256, request.stream())
        response.status_code = 201 if new else 200
        return artefact


def _add_metadata(router: APIRouter, kind: ArtefactKind) -> None:
    absent = f"{SINGULAR[kind]}_not_found"

    @router.head(
        "/{sha256}",
        summary=f"Whether a {_WHAT[kind]} is there",
        description="The headers of the GET; an upload of what is there is not needed.",
        responses={200: {"description": "It is"}, **problems(absent)},
    )
    @router.get(
        "/{sha256}",
        summary=f"Metadata of an uploaded {_WHAT[kind]}",
        description="Size and time; the bytes are at `…/content`.",
        responses={**answer(200, "Its record", examples.ARTEFACT[kind]), **problems(absent)},
    )
    async def get(sha256: Sha256Path, resources: ResourcesDependency) -> Artefact:
        return await run_in_threadpool(get_artefact, resources, kind, sha256)


def _add_content(router: APIRouter, kind: ArtefactKind) -> None:
    absent = f"{SINGULAR[kind]}_not_found"

    @router.head(
        "/{sha256}/content",
        summary=f"Size of an uploaded {_WHAT[kind]}",
        description="The headers of the GET.",
        response_class=Response,
        responses={200: {"description": "Content-Length, ETag, Accept-Ranges"}, **problems(absent)},
    )
    @router.get(
        "/{sha256}/content",
        summary=f"Bytes of an uploaded {_WHAT[kind]}",
        description="Single HTTP ranges are honoured.",
        response_class=Response,
        responses={
            200: {"description": "All bytes", "content": BYTES},
            206: {"description": "The range asked for", "content": BYTES},
            **REDIRECT,
            **problems(absent, "range_not_satisfiable"),
        },
        openapi_extra=RANGE_HEADER,
    )
    async def content(
        sha256: Sha256Path, request: Request, resources: ResourcesDependency, direct: Direct = False
    ) -> Response:
        artefact = await run_in_threadpool(get_artefact, resources, kind, sha256)
        key = artefact_key(kind, sha256)
        return await deliver_object(request, resources, key, artefact.size_bytes, etag=sha256, direct=direct)
