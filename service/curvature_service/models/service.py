"""What models are: found by jobs of a kind of their own, once per model and version of the engine."""

import hashlib

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import Artefact
from curvature_protocol.catalogue import Catalogue
from curvature_protocol.errors import ErrorFamily, family_of
from curvature_protocol.inspections import InspectedModel, Inspection
from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus
from curvature_protocol.names import result_key
from curvature_service.artefacts.service import get_artefact
from curvature_service.extensions.service import CatalogueCache
from curvature_service.jobs.service import wait_for
from curvature_service.jobs.submission import announce, missing
from curvature_service.resources import Resources
from curvature_state.artefacts import ArtefactMissing
from curvature_state.jobs import NewJob, create_job, forget_key
from curvature_state.uses import touch_result

_PRIORITY = 9
_LIMIT_SECONDS = 300.0
"""Loading a model can run code of its own, and nobody waits to cancel it."""
_OWN = "inspection\n"
"""Begins our idempotency keys: no header can hold a line's end, so no request's key is one of them."""


async def inspect_model(
    resources: Resources, tenant: str, catalogue: CatalogueCache, sha256: str, seconds: float
) -> InspectedModel:
    """The model's record and its inspection, waited for at most so long.

    Raises:
        ApiError: `model_not_found`.
    """
    artefact = await run_in_threadpool(get_artefact, resources, "models", sha256)
    job = await run_in_threadpool(_inspection_of, resources, tenant, catalogue.current(), sha256)
    if job.status not in FINAL and seconds > 0:
        job = await wait_for(resources, job, seconds)
    return await run_in_threadpool(_view, resources, artefact, job)


def _inspection_of(resources: Resources, tenant: str, catalogue: Catalogue, sha256: str) -> Job:
    """The job that inspected the model, inspects it, or is made now.

    Raises:
        ApiError: `model_not_found`, if the model was removed at this moment.
    """
    new = _new_job(tenant, catalogue, sha256)
    try:
        found = create_job(resources.database, new)
        if found.repeated and not _still_holds(resources, found.job):
            forget_key(resources.database, found.job.id)
            found = create_job(resources.database, new)
    except ArtefactMissing as error:
        raise missing(error) from error
    if not found.repeated:
        announce(resources, found.job)
    return found.job


def _new_job(tenant: str, catalogue: Catalogue, sha256: str) -> NewJob:
    # Other extensions, or another engine, may say something else of the same model.
    version = hashlib.sha256(catalogue.model_dump_json().encode()).hexdigest()
    request = {"model": sha256, "timeout_seconds": _LIMIT_SECONDS}
    key = f"{_OWN}{sha256} {version}"
    return NewJob(
        request,
        version,
        key,
        tenant=tenant,
        priority=_PRIORITY,
        kind=JobKind.INSPECTION,
        artefacts=frozenset({("models", sha256)}),
    )


def _still_holds(resources: Resources, job: Job) -> bool:
    """Whether a job is on its way, has found what still is there, or refused the model for good."""
    if job.status == JobStatus.SUCCEEDED:
        return resources.objects.head(_key(job)) is not None
    if job.status == JobStatus.FAILED:
        return job.error is not None and family_of(job.error.code) == ErrorFamily.UNPROCESSABLE
    return job.status not in FINAL


def _view(resources: Resources, artefact: Artefact, job: Job) -> InspectedModel:
    found = None
    if job.status == JobStatus.SUCCEEDED:
        touch_result(resources.database, job.id)
        found = Inspection.model_validate_json(resources.objects.get_bytes(_key(job)))
    return InspectedModel(
        **dict(artefact), inspection=found, inspection_status=job.status, inspection_job=job.id, error=job.error
    )


def _key(job: Job) -> str:
    return result_key(job.id, job.attempt, "inspection.json")
