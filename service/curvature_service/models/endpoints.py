"""`GET /v1/models/{sha256}`: a model's record, and what the model is."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.inspections import InspectedModel
from curvature_service import examples
from curvature_service.artefacts.paths import Sha256Path
from curvature_service.artefacts.service import get_artefact
from curvature_service.authentication import TenantDependency
from curvature_service.models.service import inspect_model
from curvature_service.openapi import answer, problems
from curvature_service.resources import ResourcesDependency

_WAIT_SECONDS = 10.0

Wait = Annotated[float, Query(ge=0, description="seconds to wait for the inspection, at most")]


def add_inspected_model(router: APIRouter) -> None:
    """Add the endpoints to those of the uploads."""

    @router.head(
        "/{sha256}",
        summary="Whether a model file is there",
        description="An upload of what is there is not needed. Starts no inspection.",
        response_class=Response,
        responses={200: {"description": "It is"}, **problems("model_not_found")},
    )
    async def head(sha256: Sha256Path, resources: ResourcesDependency) -> Response:
        await run_in_threadpool(get_artefact, resources, "models", sha256)
        reply = Response(media_type="application/json")
        del reply.headers["Content-Length"]  # the inspection's is not known before it is there
        return reply

    @router.get(
        "/{sha256}",
        summary="An uploaded model file and what is in it",
        description="Size and time (the bytes are at `…/content`), and the model's inspection: inputs, parameters, "
        "buffers, operators, and which extensions each parameter is expected to get in closed form, by fallback, or "
        "not at all. A worker inspects a model once, without running it; until then `inspection` is null. A model "
        "that cannot be inspected says why in `error`.",
        responses={**answer(200, "Its record and inspection", examples.INSPECTED_MODEL), **problems("model_not_found")},
    )
    async def get(
        sha256: Sha256Path,
        request: Request,
        resources: ResourcesDependency,
        tenant: TenantDependency,
        wait: Wait = _WAIT_SECONDS,
    ) -> InspectedModel:
        seconds = min(wait, resources.settings.max_wait_seconds)
        return await inspect_model(resources, tenant, request.app.state.catalogue, sha256, seconds)
