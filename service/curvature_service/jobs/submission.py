"""From a request to rows: checked, completed, answered from the cache where it can be."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from curvature_protocol.artefacts import SINGULAR
from curvature_protocol.catalogue import Catalogue
from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus
from curvature_protocol.names import result_prefix
from curvature_protocol.requests import (
    BatchReference,
    DataSet,
    DataSetPart,
    ExtensionRequest,
    InlineBatch,
    JobRequest,
    LossReference,
    referenced_batch,
)
from curvature_service.artefacts.service import get_artefact, store_small
from curvature_service.bells import ring
from curvature_service.errors import ApiError
from curvature_service.extensions.service import CatalogueCache, check_request
from curvature_service.resources import Resources
from curvature_service.webhooks.urls import check_url
from curvature_state import events
from curvature_state.artefacts import ArtefactMissing, Reference
from curvature_state.cache import LoadedModel, cache_keys, find_cached, find_digest
from curvature_state.jobs import Created, NewJob, ReadyResult, create_job, find_by_key
from curvature_state.manifests import from_cache, read_manifest, sources_of, store_manifest
from curvature_state.tenants import QueueFull
from curvature_state.uses import ResultGone
from curvature_state.webhooks import without_secret
from curvature_state.workers import list_workers

MAX_REQUEST_BYTES = 256 * 2**10
"""Limit on a request without its batch: names, options, metadata. Every list of jobs shows it again."""

_FULL_AGAIN_SECONDS = 10


def submit(
    resources: Resources,
    tenant: str,
    catalogue: CatalogueCache,
    request: JobRequest,
    idempotency_key: str | None,
    kind: JobKind = JobKind.ANALYSIS,
) -> tuple[Job, bool]:
    """Write the job and ring the bell; returns the job and whether it is new.

    Raises:
        ApiError: whatever the request lacks.
    """
    reference, inline = _batch_of(resources, request)
    if kind == JobKind.PLAN and isinstance(reference, DataSet):
        reference = _largest(reference)
    stored = request.model_copy(update={"batch": reference})
    new = new_job(stored, kind=kind, tenant=tenant, idempotency_key=idempotency_key)
    # Before any check: what was accepted once stays accepted, whatever became of model, batch and catalogue since.
    found = find_by_key(resources.database, new)
    if found is None:
        known = catalogue.current()
        check_request(known, request)
        if request.webhook is not None:
            check_url(resources.settings, request.webhook.url)
        if inline is not None and isinstance(reference, BatchReference):
            store_small(resources, "batches", reference.sha256, inline)
        for (artefact_kind, sha256), param in references_in(stored):
            get_artefact(resources, artefact_kind, sha256, param=param)
        found = _create_with_cached_result(resources, known, new, stored) if kind == JobKind.ANALYSIS else None
        found = found or create(resources, new, stored)
    if found.repeated:
        return _same(found, new), False
    announce(resources, found.job)
    return found.job, True


def new_job(
    request: JobRequest, *, kind: JobKind = JobKind.ANALYSIS, tenant: str, idempotency_key: str | None = None
) -> NewJob:
    """A request, whose batch is stored, as a job and its shards.

    Raises:
        ApiError: `payload_too_large`.
    """
    body = without_secret(request.model_dump(mode="json"))
    parts = request.batch.parts if isinstance(request.batch, DataSet) else ()
    size = len(json.dumps({**body, "batch": None}))
    if size > MAX_REQUEST_BYTES:
        raise ApiError(
            "payload_too_large",
            f"a request may have {MAX_REQUEST_BYTES} bytes without its batch; it has {size}",
            param="metadata",
            remedy="shorten metadata, options and warnings",
        )
    text = request.model_dump_json()
    told = text if kind == JobKind.ANALYSIS else f"{kind} {text}"  # one key serves one kind
    job = NewJob(
        body,
        hashlib.sha256(told.encode()).hexdigest(),
        idempotency_key,
        tenant=tenant,
        priority=request.priority,
        metadata=request.metadata,
        kind=kind,
        requires=request.requires,
        artefacts=frozenset(reference for reference, _ in references_in(request)),
        webhook=request.webhook,
    )
    return replace(job, parts=tuple(shards(job, parts))) if parts else job


def shards(job: NewJob, parts: Sequence[DataSetPart]) -> Iterator[NewJob]:
    """One job per part of a data set; each knows where its samples stand in the whole."""
    common = {**job.request, "metadata": {}, "warnings": [], "webhook": None}
    options = [referenced_batch(value) for e in job.request["extensions"] for value in e["options"].values()]
    others = frozenset(r for r in job.artefacts if r[0] != "batches" or r[1] in options)
    first = 0
    for place, part in enumerate(parts):
        where = {"index": place, "first_sample": first, "samples": part.samples}
        yield NewJob(
            {**common, "batch": {"sha256": part.sha256}, "part": where},
            job.body_digest,
            tenant=job.tenant,
            priority=job.priority,
            kind=JobKind.SHARD,
            requires=job.requires,
            artefacts=others | {("batches", part.sha256)},
        )
        first += part.samples


def with_cached_result(resources: Resources, catalogue: Catalogue, new: NewJob) -> NewJob:
    """The job with its result, if everything that it asks for was computed before."""
    request = new.request
    if not request["cache"] or request["verify"]:
        return new
    digest = find_digest(resources.database, LoadedModel(request["model"], request["eval"], catalogue.engine_version))
    if digest is None:
        return new
    for device in _devices(resources, gpu=request["requires"]["gpu"]):
        keys = cache_keys(request, catalogue, digest, device)
        cached = find_cached(resources.database, new.tenant, keys.values())
        if len(keys) < len(request["extensions"]) or set(keys.values()) - cached.keys():
            continue
        try:
            manifests = {c.job_id: read_manifest(resources.objects, c.job_id, c.attempt) for c in cached.values()}
        except FileNotFoundError:  # removed at this moment
            continue
        found = {label: (cached[key], manifests[cached[key].job_id]) for label, key in keys.items()}
        manifest = from_cache(found, job_id=new.id, attempt=1, seed=request["seed"], warnings=request["warnings"])
        size = store_manifest(resources.objects, manifest)
        sources = tuple(sorted(sources_of(manifest.groups)))
        return replace(new, parts=(), result=ReadyResult(manifest.warnings, sources, size))
    return new


def _devices(resources: Resources, *, gpu: bool) -> list[str]:
    """Kinds of device that might compute the job."""
    if gpu:
        return ["cuda"]
    kinds = {worker.device.partition(":")[0] for worker in list_workers(resources.database)}
    return sorted(kinds) or ["cpu"]


def _create_with_cached_result(
    resources: Resources, catalogue: Catalogue, new: NewJob, request: JobRequest
) -> Created | None:
    """Write the row of a job everything of which was computed before; None: it is to be computed."""
    answered = with_cached_result(resources, catalogue, new)
    if answered.result is None:
        return None
    try:
        found = create(resources, answered, request)
    except (ResultGone, ApiError) as error:
        discard_cached_result(resources, answered)
        if isinstance(error, ResultGone):  # what it refers to was removed at this moment
            return None
        raise
    if found.repeated:
        discard_cached_result(resources, answered)
    return found


def discard_cached_result(resources: Resources, new: NewJob) -> None:
    """Remove the manifest of a job that was not written after all."""
    resources.objects.delete_below(result_prefix(new.id))


def create(resources: Resources, new: NewJob, request: JobRequest) -> Created:
    """Write the rows.

    Raises:
        ApiError: `queue_full`, or an upload was removed at this moment.
        ResultGone: so was a result that the job's own refers to.
    """
    try:
        return create_job(resources.database, new)
    except ArtefactMissing as error:
        param = dict(references_in(request)).get((error.kind, error.sha256))
        raise missing(error, param) from error
    except QueueFull as error:
        raise full(error) from error


def missing(error: ArtefactMissing, param: str | None = None) -> ApiError:
    """The refusal of a job whose upload is not there."""
    what = SINGULAR[error.kind]
    return ApiError(
        f"{what}_not_found",
        f"no {what} with the SHA-256 {error.sha256} is stored",
        param=param or what,
        remedy=f"PUT its bytes to /v1/{error.kind}/{error.sha256}",
    )


def full(error: QueueFull) -> ApiError:
    """The refusal of jobs that a tenant has no room for."""
    fits = error.wanted <= error.limit
    return ApiError(
        "queue_full",
        f"tenant {error.tenant} may have {error.limit} queued jobs; {error.queued} are queued and {error.wanted} came",
        remedy="wait until some are done, or ask the operator for a higher limit"
        if fits
        else f"submit at most {error.limit} at once, or ask the operator for a higher limit",
        headers={"Retry-After": str(_FULL_AGAIN_SECONDS)} if fits else None,
    )


def announce(resources: Resources, job: Job, count: int | None = None) -> None:
    """Tell followers and workers of a job that was queued; `count` is how many shards of it were, if not all."""
    events.publish(resources.redis, events.state_event(job))
    if job.status in FINAL:
        return
    requires = job.request.get("requires") or {}
    queued = 1 if job.status == JobStatus.QUEUED else job.parts or 1
    ring(resources, {(requires.get("gpu", False), requires.get("tag")): (job.id, count or queued)})


def _batch_of(resources: Resources, request: JobRequest) -> tuple[BatchReference | DataSet, bytes | None]:
    """The batch by hash, and its bytes if they ride inside the request."""
    if not isinstance(request.batch, InlineBatch):
        return request.batch, None
    data = request.batch.data
    limit = resources.settings.inline_batch_bytes
    if len(data) > limit:
        raise inline_too_large(limit, f"{len(data)} bytes")
    return BatchReference(sha256=hashlib.sha256(data).hexdigest()), data


def _largest(data_set: DataSet) -> BatchReference:
    """The part that a plan of a data set is of: no other takes more memory."""
    return BatchReference(sha256=max(data_set.parts, key=lambda part: part.samples).sha256)


def inline_too_large(limit: int, came: str) -> ApiError:
    """The refusal of a batch too large to ride inside a request."""
    return ApiError(
        "payload_too_large",
        f"a batch inside the request may have {limit} bytes; {came} came",
        param="batch.data",
        remedy="PUT it to /v1/batches/{sha256} and refer to it by its hash",
    )


def references_in(request: JobRequest) -> Iterator[tuple[Reference, str]]:
    """Every upload that a request refers to, and the field that names it."""
    yield ("models", request.model), "model"
    if isinstance(request.batch, BatchReference):
        yield ("batches", request.batch.sha256), "batch"
    elif isinstance(request.batch, DataSet):
        for place, part in enumerate(request.batch.parts):
            yield ("batches", part.sha256), f"batch.parts.{place}"
    if isinstance(request.loss, LossReference):
        yield ("losses", request.loss.sha256), "loss"
    for place, extension in enumerate(request.extensions):
        yield from _options_of(extension, place)


def _options_of(extension: ExtensionRequest, place: int) -> Iterator[tuple[Reference, str]]:
    for option, sha256 in extension.batches.items():
        yield ("batches", sha256), f"extensions.{place}.options.{option}"


def _same(found: Created, new: NewJob) -> Job:
    if found.body_digest != new.body_digest:
        raise ApiError(
            "idempotency_conflict",
            f"the idempotency key {new.idempotency_key!r} was used with another body, for job {found.job.id}",
            param="Idempotency-Key",
            remedy="use a new key for a new request",
        )
    return found.job
