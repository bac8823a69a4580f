"""Deleting and pinning, as a tenant may; what a policy lets go."""

import logging
from datetime import timedelta

from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind
from curvature_protocol.jobs import Job
from curvature_service.artefacts.service import get_artefact
from curvature_service.errors import ApiError
from curvature_service.jobs.service import find_job, unknown
from curvature_service.resources import Resources
from curvature_service.settings import ServiceSettings
from curvature_service.sweeps.service import unknown as unknown_sweep
from curvature_state import deletion, pins
from curvature_state.deletion import InUse, NotOver
from curvature_state.policy import Policy
from curvature_state.removals import clear_removals

logger = logging.getLogger("curvature.service")


def policy_of(settings: ServiceSettings) -> Policy:
    """The limits of the settings."""
    return Policy(
        keep_results=_days(settings.keep_results_days),
        keep_jobs=_days(settings.keep_jobs_days),
        keep_plans=_days(settings.keep_plans_days),
        keep_uploads=_days(settings.keep_uploads_days),
        max_stored_bytes=settings.max_stored_bytes,
    )


def _days(count: float | None) -> timedelta | None:
    return None if count is None else timedelta(days=count)


async def delete_job(resources: Resources, tenant: str, job_id: str) -> None:
    """Delete a tenant's job that is over, with what it stored.

    Raises:
        ApiError: `job_not_found`, `job_not_finished`, `in_use`.
    """
    await find_job(resources, tenant, job_id)
    await run_in_threadpool(_delete_job, resources, job_id)


def _delete_job(resources: Resources, job_id: str) -> None:
    try:
        found = deletion.delete_job(resources.database, job_id)
    except (NotOver, InUse) as error:
        raise refusal(error, "job_id") from error
    if found is None:
        raise unknown(job_id)
    clear_removals(resources.database, resources.objects, found)


def delete_sweep(resources: Resources, tenant: str, sweep_id: str) -> None:
    """Delete a tenant's sweep with its jobs, all of which must be over. Their files go by `clear_files`.

    Raises:
        ApiError: `sweep_not_found`, `job_not_finished`, `in_use`.
    """
    try:
        found = deletion.delete_sweep(resources.database, tenant, sweep_id)
    except (NotOver, InUse) as error:
        raise refusal(error, "sweep_id") from error
    if not found:
        raise unknown_sweep(sweep_id)


def clear_files(resources: Resources) -> None:
    """Remove the files of what was deleted; what is left of them, the next collection removes."""
    try:
        clear_removals(resources.database, resources.objects)
    except Exception:  # the store may be away for a while
        logger.exception("files of what was deleted could not be removed")


def delete_artefact(resources: Resources, tenant: str, kind: ArtefactKind, sha256: str) -> None:
    """Delete an upload that is the tenant's alone, as far as jobs go, and that no unfinished job needs.

    Raises:
        ApiError: `model_not_found`, `batch_not_found` or `loss_not_found`; `in_use`.
    """
    try:
        found = deletion.delete_artefact(resources.database, kind, sha256, tenant)
    except InUse as error:
        raise refusal(error, SINGULAR[kind], f"the {SINGULAR[kind]} {sha256} stays: ") from error
    if not found:
        get_artefact(resources, kind, sha256)  # says what is not there
    clear_removals(resources.database, resources.objects, [sha256])


def refusal(error: NotOver | InUse, param: str, prefix: str = "") -> ApiError:
    """The refusal of a deletion."""
    if isinstance(error, NotOver):
        remedy = f"wait for its end, or POST /v1/jobs/{error.job_id}/cancel"
        return ApiError(
            "job_not_finished", f"job {error.job_id} is {error.status}: it is not over", param=param, remedy=remedy
        )
    return ApiError("in_use", f"{prefix}{error.why}", param=param, remedy=error.remedy)


async def pin_job(resources: Resources, tenant: str, job_id: str, *, pinned: bool) -> Job:
    """Pin a tenant's job, or unpin it.

    Raises:
        ApiError: `job_not_found`.
    """
    await find_job(resources, tenant, job_id)
    job = await run_in_threadpool(pins.pin_job, resources.database, job_id, pinned=pinned)
    if job is None:
        raise unknown(job_id)
    return job


def pin_artefact(resources: Resources, kind: ArtefactKind, sha256: str, *, pinned: bool) -> Artefact:
    """Pin an upload, or unpin it.

    Raises:
        ApiError: `model_not_found`, `batch_not_found` or `loss_not_found`.
    """
    get_artefact(resources, kind, sha256)
    found = pins.pin_artefact(resources.database, kind, sha256, pinned=pinned)
    return found if found is not None else get_artefact(resources, kind, sha256)
