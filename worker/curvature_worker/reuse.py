"""What of a job was computed before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from curvature_protocol.jobs import JobKind
from curvature_protocol.results import Manifest
from curvature_state.cache import Cached, LoadedModel, cache_keys, find_cached, find_digest, record_digest
from curvature_state.manifests import read_manifest
from curvature_state.turns import ClaimedJob
from curvature_worker.computing import compute
from curvature_worker.contact import Contact
from curvature_worker.errors import JobRefused
from curvature_worker.tools import Tools


@dataclass(frozen=True)
class Reuse:
    """What the cache has for a job.

    Attributes:
        keys: label → key; none where the cache is not to be used.
        found: label → where it is stored, and the manifest there.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, tuple[Cached, Manifest]] = field(default_factory=dict)


def look_up(tools: Tools, contact: Contact, job: ClaimedJob, model: Path | None) -> Reuse:
    """What the cache has for a job; `model` is the file of its model, where the digest may have to be computed."""
    request = job.request
    # Jobs queued before there was a cache say nothing of it.
    if job.kind not in (JobKind.ANALYSIS, JobKind.SHARD) or not request.get("cache", False) or request["verify"]:
        return Reuse()
    catalogue = tools.catalogue()
    loaded = LoadedModel(request["model"], request["eval"], catalogue.engine_version)
    digest = tools.digests.get(loaded) or find_digest(tools.database, loaded)
    if digest is None:
        if model is None:
            return Reuse()
        digest = _compute_digest(tools, contact, job, model)
        record_digest(tools.database, loaded, digest)
    tools.digests[loaded] = digest
    keys = cache_keys(request, catalogue, digest, tools.settings.device.partition(":")[0])
    cached = find_cached(tools.database, job.tenant, keys.values())
    manifests: dict[tuple[str, int], Manifest] = {}
    found = {}
    for label, key in keys.items():
        if key not in cached:
            continue
        entry = cached[key]
        try:
            where = (entry.job_id, entry.attempt)
            manifests.setdefault(where, read_manifest(tools.objects, *where))
        except FileNotFoundError:  # removed at this moment
            continue
        found[label] = (entry, manifests[where])
    contact.lap("look_up")
    return Reuse(keys, found)


def _compute_digest(tools: Tools, contact: Contact, job: ClaimedJob, model: Path) -> str:
    """The model's canonical digest, by the child: nobody else opens models."""
    order = {"kind": "digest", "model": job.request["model"], "request": {"eval": job.request["eval"]}}
    reply, _ = compute(tools, contact, job, order, {}, model)
    digest = reply.get("digest")
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
        tools.pool.discard(job.tenant)
        raise JobRefused("internal_error", "the model's process gave a digest that makes no sense")
    return digest
