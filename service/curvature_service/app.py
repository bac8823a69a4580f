"""The application."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import HTMLResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from curvature_service.artefacts.endpoints import artefact_router
from curvature_service.authentication import KnownKeys, authenticate
from curvature_service.errors import install_handlers
from curvature_service.events.endpoints import router as events_router
from curvature_service.extensions.endpoints import router as extensions_router
from curvature_service.extensions.service import CatalogueCache
from curvature_service.health.endpoints import router as health_router
from curvature_service.jobs.endpoints import router as jobs_router
from curvature_service.openapi import DocumentedApp
from curvature_service.plans.endpoints import router as plans_router
from curvature_service.reconciler import run_reconciler
from curvature_service.resources import Resources
from curvature_service.results.endpoints import router as results_router
from curvature_service.retention.collector import run_collector
from curvature_service.retention.endpoints import router as retention_router
from curvature_service.settings import ServiceSettings
from curvature_service.sweeps.endpoints import router as sweeps_router
from curvature_service.uploads.endpoints import router as uploads_router
from curvature_service.webhooks.deliverer import run_deliverer

_DESCRIPTION = (
    "Individual gradients, GGN diagonals and Kronecker factors of any TorchScript model. Upload a model and a batch, "
    "submit a job, read the tensors. Every error is an RFC 9457 problem with `code`, `param` and `remedy`."
)
_DOCS = Path(__file__).parent / "docs.html"
_SANE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def create_app(settings: ServiceSettings) -> FastAPI:
    """The API. Nothing is opened before it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        resources = Resources(settings)
        app.state.resources = resources
        app.state.catalogue = CatalogueCache(resources)
        app.state.keys = KnownKeys(resources.database)
        background = [asyncio.create_task(run(resources)) for run in (run_reconciler, run_deliverer, run_collector)]
        yield
        for task in background:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await resources.close()

    app = DocumentedApp(
        title="Curvature",
        version=version("curvature"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    install_handlers(app)
    app.add_middleware(_RequestIds)
    protected = APIRouter(dependencies=[Depends(authenticate)])
    # Results and events come first: `/jobs/{job_id}` must not swallow their paths.
    for router in (
        artefact_router("models"),
        artefact_router("batches"),
        artefact_router("losses"),
        events_router,
        results_router,
        retention_router,
        jobs_router,
        sweeps_router,
        plans_router,
        uploads_router,
        extensions_router,
    ):
        protected.include_router(router)
    app.include_router(protected, prefix="/v1")
    app.include_router(health_router, prefix="/v1")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_DOCS.read_text(encoding="utf-8"))

    return app


class _RequestIds:
    """Every reply carries the request's id, the caller's own if it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
