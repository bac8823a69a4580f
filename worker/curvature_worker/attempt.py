"""One attempt at one job: fetch, admit, look up, compute or merge, check, store."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError as StoreError

from curvature_protocol.jobs import JobKind
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest
from curvature_state.endings import Ending, Success, succeed
from curvature_state.manifests import MANIFEST, cached_group, from_cache, sources_of, store_manifest
from curvature_state.turns import ClaimedJob
from curvature_state.uses import ResultGone
from curvature_worker.admitting import admitted, small_enough
from curvature_worker.computing import compute
from curvature_worker.contact import Contact
from curvature_worker.errors import JobRefused, LeaseLost
from curvature_worker.inbox import batch_name, loss_name
from curvature_worker.launcher import Confined
from curvature_worker.lease import Lease
from curvature_worker.manifest import build_manifest
from curvature_worker.merging import merge
from curvature_worker.orders import batches_of, labels_of, loss_function, order_of
from curvature_worker.reports import read_report
from curvature_worker.reuse import Reuse, look_up
from curvature_worker.testimony import take
from curvature_worker.tools import Tools

logger = logging.getLogger("curvature.worker")


class Attempt:
    """One attempt at one job, its lease held by the caller."""

    def __init__(self, tools: Tools, job: ClaimedJob, lease: Lease) -> None:
        self._tools, self._job, self._lease = tools, job, lease
        self._contact = Contact(tools, job, lease)

    def run(self) -> Ending:
        """From the claim to the stored result.

        Raises:
            JobRefused, JobStopped, LeaseLost, WorkerStopping, WorkerUnfit: as they say.
        """
        try:
            if self._job.parts is not None:
                return self._merge()
            if self._job.kind in (JobKind.ANALYSIS, JobKind.SHARD):
                return self._analyze()
            return self._report()
        except (StoreError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            logger.exception("job %s: files could not be moved", self._job.id)
            raise JobRefused(
                "unavailable", f"the worker could not move the job's files: {reason}", remedy="try again later"
            ) from error

    # Kinds of jobs

    def _analyze(self) -> Ending:
        """Compute what was not computed before."""
        model = admitted(self._tools, self._contact, "models", self._job.request["model"])
        reuse = look_up(self._tools, self._contact, self._job, model)
        labels = [label for label in labels_of(self._job.request) if label not in reuse.found]
        if not labels:
            return self._answer_from_cache(reuse)
        files = self._fetch(self._job.request)
        self._contact.lap("fetch")
        order = order_of(self._job, labels, self._most_bytes())
        reply, child = compute(self._tools, self._contact, self._job, order, files, model)
        return self._store(reply, child, labels, reuse)

    def _answer_from_cache(self, reuse: Reuse) -> Ending:
        request = self._job.request
        manifest = from_cache(
            {label: reuse.found[label] for label in labels_of(request)},
            job_id=self._job.id,
            attempt=self._job.attempt,
            seed=request["seed"],
            warnings=request.get("warnings", []),
        )
        if manifest.part is not None:  # the same batch may have stood elsewhere in another data set
            here = manifest.part.model_copy(update={"first_sample": request["part"]["first_sample"]})
            manifest = manifest.model_copy(update={"part": here})
        return self._commit(manifest, {}, reuse)

    def _merge(self) -> Ending:
        """Merge what the shards of a data set made."""
        reuse = look_up(self._tools, self._contact, self._job, None)
        merged = merge(self._tools, self._contact, self._job)
        try:
            return self._commit(merged.manifest, merged.files, reuse)
        finally:
            merged.child.empty_outbox()

    def _report(self) -> Ending:
        """Find what needs no tensors, and store it."""
        job, tools = self._job, self._tools
        model = admitted(tools, self._contact, "models", job.request["model"])
        files = {} if job.kind == JobKind.INSPECTION else self._fetch(job.request)
        self._contact.lap("fetch")
        labels = [] if job.kind == JobKind.INSPECTION else labels_of(job.request)
        reply, _ = compute(tools, self._contact, job, order_of(job, labels, None), files, model)
        try:
            report = read_report(job.kind, reply)
        except JobRefused:
            tools.pool.discard(job.tenant)
            raise
        self._contact.tell("storing")
        key = result_key(job.id, job.attempt, f"{job.kind}.json")
        tools.objects.put_bytes(key, report)
        return self._succeed(Success(job.request.get("warnings", []), len(report)), [key])

    # Steps

    def _fetch(self, request: Mapping[str, Any]) -> dict[str, Path]:
        """Name in the inbox → file, of what a request refers to beside the model."""
        check, cache = self._contact.check, self._tools.cache
        files = {batch_name(s): cache.fetch_upload("batches", s, check) for s in batches_of(request)}
        if (loss := loss_function(request)) is not None:
            files[loss_name(loss)] = small_enough(admitted(self._tools, self._contact, "losses", loss))
        return files

    def _most_bytes(self) -> int | None:
        """What the plan may take, if there is a larger worker for a job that takes more."""
        budget = int(str(self._tools.pool.greeting["budget_bytes"]))
        return budget if self._tools.has_larger(budget) else None

    def _store(self, reply: dict[str, Any], child: Confined, labels: Sequence[str], reuse: Reuse) -> Ending:
        """Check what the child wrote, store it, and commit the job's row to it."""
        try:
            files, manifest = self._checked(reply, child, labels)
            self._contact.lap("check")
            self._contact.tell("storing")
            return self._commit(self._with_cached(manifest, reuse), files, reuse)
        finally:
            child.empty_outbox()

    def _with_cached(self, manifest: Manifest, reuse: Reuse) -> Manifest:
        """What was computed now and what was before, in the order asked for, with the warnings of both."""
        groups = {group.label: group for group in manifest.groups}
        warnings = dict.fromkeys(manifest.warnings)
        for label, (cached, found) in reuse.found.items():
            groups[label] = cached_group(found, cached, label)
            warnings |= dict.fromkeys(found.warnings)
        ordered = tuple(groups[label] for label in labels_of(self._job.request))
        return manifest.model_copy(update={"groups": ordered, "warnings": tuple(warnings)})

    def _checked(
        self, reply: dict[str, Any], child: Confined, labels: Sequence[str]
    ) -> tuple[dict[str, Path], Manifest]:
        """(label → file, each moved out of the child's reach; the manifest).

        Raises:
            JobRefused: `internal_error` if something is wrong with them; the child gets no other job then.
        """
        job = self._job
        try:
            files = {label: take(child, file_name(label)) for label in labels}
            manifest = build_manifest(
                reply,
                files,
                job_id=job.id,
                attempt=job.attempt,
                isolation=str(child.greeting["isolation"]),
                warnings=list(job.request.get("warnings", [])),
            )
        except JobRefused:
            self._tools.pool.discard(job.tenant)
            raise
        self._check_part(manifest)
        return files, manifest

    def _check_part(self, manifest: Manifest) -> None:
        """See that a shard's batch has as many samples as the data set's other shards count on.

        Raises:
            JobRefused: `invalid_batch`.
        """
        part = self._job.request.get("part")
        if part is not None and (manifest.part is None or manifest.part.samples != part["samples"]):
            found = "an unknown number of" if manifest.part is None else str(manifest.part.samples)
            raise JobRefused(
                "invalid_batch",
                f"part {part['index']} of the data set was announced with {part['samples']} samples; it has {found}",
                param=f"batch.parts.{part['index']}.samples",
                remedy="count the rows of its targets",
            )

    # The end

    def _commit(self, manifest: Manifest, files: Mapping[str, Path], reuse: Reuse) -> Ending:
        """Store files and manifest, all of them or none, and commit the job's row to them.

        Raises:
            LeaseLost: somebody else has the job now, and what was stored is removed; or nobody can say, and it stays.
        """
        job, objects = self._job, self._tools.objects
        keys = [result_key(job.id, job.attempt, file_name(label)) for label in files]
        keys.append(result_key(job.id, job.attempt, MANIFEST))
        try:
            size = 0
            for key, path in zip(keys, files.values(), strict=False):
                self._lease.check()  # a worker that is told to stop still delivers what is computed
                size += objects.put_file(key, path)
            self._contact.lap("store")
            timings = {**self._contact.timings, **manifest.timings_ms}
            size += store_manifest(objects, manifest.model_copy(update={"timings_ms": timings}))
        except BaseException:
            self._remove(keys)
            raise
        computed = [group for group in manifest.groups if group.source is None]
        success = Success(
            manifest.warnings,
            size,
            sources_of(manifest.groups),
            {reuse.keys[group.label]: group.label for group in computed if group.label in reuse.keys},
        )
        return self._succeed(success, keys)

    def _succeed(self, success: Success, keys: Sequence[str]) -> Ending:
        job, database = self._job, self._tools.database
        try:
            ending = self._lease.write(lambda: succeed(database, job.id, job.attempt, success))
        except ResultGone as error:
            self._remove(keys)
            reason = "a result that was to be taken from the cache was removed at this moment"
            raise JobRefused("unavailable", reason, remedy="try again") from error
        if ending is None:
            self._remove(keys)
            raise LeaseLost
        return ending

    def _remove(self, keys: Sequence[str]) -> None:
        """Remove what this attempt stored; what cannot be removed now, the reconciler finds."""
        for key in reversed(keys):
            with suppress(StoreError, OSError):
                self._tools.objects.delete(key)


def file_name(label: str) -> str:
    """The name of a label's file."""
    return f"{label}.safetensors"
