"""`/v1/extensions`: what the workers can compute."""

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.catalogue import Catalogue
from curvature_service import examples
from curvature_service.openapi import answer, problems

router = APIRouter(prefix="/extensions", tags=["extensions"])


@router.get(
    "",
    summary="The catalogue of extensions and losses",
    responses={**answer(200, "The catalogue", examples.CATALOGUE), **problems()},
)
async def list_extensions(request: Request) -> Catalogue:
    """Names, options as JSON schema, shapes, formulas and sources, as published by the workers."""
    catalogue: Catalogue = await run_in_threadpool(request.app.state.catalogue.current)
    return catalogue
