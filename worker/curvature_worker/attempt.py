"""One attempt at one job: fetch, admit, compute, check, store."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from obstore.exceptions import BaseError as StoreError

from curvature_protocol.artefacts import SINGULAR, ArtefactKind
from curvature_protocol.errors import FAMILIES
from curvature_protocol.jobs import JobKind, Progress
from curvature_protocol.names import admitted_key, result_key
from curvature_protocol.requests import referenced_batch
from curvature_protocol.results import Manifest
from curvature_state import Database, ObjectStore, jobs
from curvature_worker import admission
from curvature_worker.cache import ArtefactCache, place
from curvature_worker.channel import ChannelClosed
from curvature_worker.errors import JobRefused, LeaseLost, WorkerStopping
from curvature_worker.inbox import batch_name, loss_name
from curvature_worker.launcher import Confined, launch
from curvature_worker.lease import Lease
from curvature_worker.manifest import build_manifest
from curvature_worker.pool import ChildPool
from curvature_worker.reporter import Reporter
from curvature_worker.reports import read_report
from curvature_worker.sealing import FileInUse
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_SEND_SECONDS = 30.0
_ADMISSION_SECONDS = 60.0
_ADMISSION_BYTES_PER_SECOND = 10 * 2**20
_MESSAGE_CHARACTERS = 4000
_LOSS_BYTES = 64 * 2**20
_SAVE_LOSS = "save a function of (outputs, targets) with torch.jit.script(function).save(path)"
_STAINED = frozenset({"internal_error", "out_of_memory"})
"""Errors after which a child is not used again: its device context may be broken, its memory in pieces."""


@dataclass(frozen=True)
class Tools:
    """What attempts work with."""

    settings: WorkerSettings
    database: Database
    objects: ObjectStore
    cache: ArtefactCache
    pool: ChildPool
    reporter: Reporter
    scratch: Path
    stopping: Event


class Attempt:
    """One attempt at one job, its lease held by the caller."""

    def __init__(self, tools: Tools, job: jobs.ClaimedJob, lease: Lease) -> None:
        self._tools, self._job, self._lease = tools, job, lease
        self._timings = {"queue": 1e3 * (datetime.now(UTC) - job.created_at).total_seconds()}
        self._mark = time.perf_counter()

    def run(self) -> None:
        """From the claim to the stored result.

        Raises:
            JobRefused, JobStopped, LeaseLost, WorkerStopping, WorkerUnfit: as they say.
        """
        try:
            model = self._admitted("models", self._job.request["model"])
            files = {} if self._job.kind == JobKind.INSPECTION else self._fetch(self._job.request)
            self._lap("fetch")
            reply, child = self._compute(model, files)
            if self._job.kind == JobKind.ANALYSIS:
                self._store(reply, child)
            else:
                self._store_report(reply)
        except (StoreError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            logger.exception("job %s: files could not be moved", self._job.id)
            raise JobRefused(
                "unavailable", f"the worker could not move the job's files: {reason}", remedy="try again later"
            ) from error

    # Steps

    def _fetch(self, request: dict[str, Any]) -> dict[str, Path]:
        """Name in the inbox → file, of what a request refers to beside the model."""
        cache = self._tools.cache
        files = {batch_name(s): cache.fetch_upload("batches", s, self._check) for s in _batches(request)}
        if (loss := _loss_function(request)) is not None:
            files[loss_name(loss)] = self._small_enough(self._admitted("losses", loss))
        return files

    def _admitted(self, kind: ArtefactKind, sha256: str) -> Path:
        """The admitted form of a model or a loss function, made now if this is its first job."""
        key = admitted_key(sha256, admission.ADMISSION_VERSION)
        found = self._tools.cache.fetch(key, self._check)
        if found is not None:
            return found
        self._tell("admitting")
        source = self._tools.cache.fetch_upload(kind, sha256, self._check)
        self._lap("fetch")
        judge = launch(
            "curvature_worker.admission",
            scratch=self._tools.scratch,
            options={},
            limits={"AS": admission.MEMORY_BYTES},
        )
        try:
            self._admit(judge, source, key, kind)
        finally:
            judge.kill()
        self._lap("admit")
        found = self._tools.cache.fetch(key, self._check)
        if found is None:
            raise JobRefused("internal_error", f"the admitted {SINGULAR[kind]} was not stored")
        return found

    def _admit(self, judge: Confined, source: Path, key: str, kind: ArtefactKind) -> None:
        """Have a file judged; store what was accepted.

        Raises:
            JobRefused: `invalid_model`, `unsupported_loss`, or what kept it from being judged.
        """
        who = f"the admission of the {SINGULAR[kind]}"
        place(source, judge.inbox / "model")
        limit = _ADMISSION_SECONDS + source.stat().st_size / _ADMISSION_BYTES_PER_SECOND
        self._say(judge, {"judge": "model"}, who)
        verdict = self._listen(judge, {"admitted", "refused", "failed"}, who, limit)
        if verdict["event"] == "refused":
            if kind == "losses":
                reason = f"in the loss function: {_text(verdict, 'message') or 'not admitted'}"
                raise JobRefused("unsupported_loss", reason, param="loss", remedy=_SAVE_LOSS)
            raise JobRefused(
                "invalid_model",
                _text(verdict, "message") or "not admitted",
                param="model",
                remedy=_text(verdict, "remedy"),
            )
        if verdict["event"] == "failed":
            raise JobRefused("unavailable", _text(verdict, "message") or "not stored", remedy="try again later")
        judge.end()  # nobody is left who could change the file
        self._tools.objects.put_file(key, _take(judge, "admitted"))

    @staticmethod
    def _small_enough(loss: Path) -> Path:
        """A loss function's file, which the child reads whole.

        Raises:
            JobRefused: `unsupported_loss` if it is too large.
        """
        if (size := loss.stat().st_size) > _LOSS_BYTES:
            reason = f"the loss function has {size} bytes; {_LOSS_BYTES} are accepted"
            raise JobRefused("unsupported_loss", reason, param="loss", remedy="keep large tensors out of it")
        return loss

    def _compute(self, model: Path, files: Mapping[str, Path]) -> tuple[dict[str, Any], Confined]:
        """Hand the job to the tenant's child; its reply, and the child, whose outbox holds the files.

        Raises:
            JobRefused: as the child or its death says.
        """
        job, pool = self._job, self._tools.pool
        child = self._hand_over(model, files)
        try:
            reply = self._listen(child, {"done", "error"}, "the model's process", job.request.get("timeout_seconds"))
        except BaseException:  # it is dead, or still at work on what nobody wants
            pool.discard(job.tenant)
            raise
        finally:
            for name in files:
                (child.inbox / name).unlink(missing_ok=True)
        self._lap("child")
        if reply["event"] == "done":
            return reply, child
        refusal = _refusal(reply)
        if refusal.code in _STAINED:
            pool.discard(job.tenant)
        else:
            child.empty_outbox()
        raise refusal

    def _hand_over(self, model: Path, files: Mapping[str, Path]) -> Confined:
        """Give the tenant's child its files and its order; a child that died while idle is replaced."""
        job, pool = self._job, self._tools.pool
        for _ in range(2):
            child = pool.acquire(job.tenant, self._check)
            pool.place_model(job.tenant, job.request["model"], model)
            for name, path in files.items():
                place(path, child.inbox / name)
            try:
                child.channel.send(_order(job), _SEND_SECONDS)
            except ChannelClosed:
                pool.discard(job.tenant)
                continue
            self._lap("hand_over")
            return child
        raise JobRefused(
            "worker_crashed", "the model's process ended before it took the job", remedy="submit the job again"
        )

    def _listen(self, process: Confined, wanted: set[str], who: str, seconds: float | None) -> dict[str, Any]:
        """Wait for a process's word, with an eye on cancellation and time.

        Raises:
            JobRefused: if it dies, stops making sense, or takes longer than `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                message = process.channel.receive(self._tools.settings.poll_seconds)
                if message is not None and message.get("event") in wanted:
                    return message
                if message is not None:
                    self._note(message)
            except ChannelClosed as error:
                code, how, remedy = process.death()
                raise JobRefused(code, f"{who} {how}", remedy=remedy) from error
            self._check()
            if deadline is not None and time.monotonic() > deadline:
                raise JobRefused(
                    "job_timeout", f"{who} took longer than its limit of {seconds:g} s", remedy="raise timeout_seconds"
                )

    def _note(self, message: dict[str, Any]) -> None:
        """Pass progress on.

        Raises:
            ChannelClosed: on anything that no honest child says.
        """
        phase, done, total = message.get("phase"), message.get("done"), message.get("total")
        if phase not in ("loading", "computing") or not isinstance(done, int) or not isinstance(total, int):
            raise ChannelClosed("a message that is no progress")
        self._tell(phase, done, total)

    def _store(self, reply: dict[str, Any], child: Confined) -> None:
        """Check what the child wrote, store it, and commit the job's row to it.

        Raises:
            LeaseLost: somebody else has the job now, and what was stored is removed; or nobody can say, and it stays.
        """
        job = self._job
        try:
            files, manifest = self._check_result(reply, child)
            self._lap("check")
            self._tell("storing")
            self._put(files, manifest)
        finally:
            child.empty_outbox()
        warnings = manifest.warnings
        if not self._lease.write(lambda: jobs.succeed(self._tools.database, job.id, job.attempt, warnings)):
            self._remove_stored(files)
            raise LeaseLost

    def _store_report(self, reply: dict[str, Any]) -> None:
        """Check and store what was found without computing tensors, and commit the job's row to it.

        Raises:
            LeaseLost: as `_store`.
        """
        job = self._job
        try:
            report = read_report(job.kind, reply)
        except JobRefused:
            self._tools.pool.discard(job.tenant)
            raise
        self._tell("storing")
        key = result_key(job.id, job.attempt, f"{job.kind}.json")
        self._tools.objects.put_bytes(key, report)
        warnings = job.request.get("warnings", [])
        if not self._lease.write(lambda: jobs.succeed(self._tools.database, job.id, job.attempt, warnings)):
            self._tools.objects.delete(key)
            raise LeaseLost

    def _check_result(self, reply: dict[str, Any], child: Confined) -> tuple[dict[str, Path], Manifest]:
        """(label → file, each moved out of the child's reach; the manifest).

        Raises:
            JobRefused: `internal_error` if something is wrong with them; the child gets no other job then.
        """
        job = self._job
        try:
            files = {label: _take(child, _file_name(label)) for label in _labels(job.request)}
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
        return files, manifest

    def _put(self, files: dict[str, Path], manifest: Manifest) -> None:
        """Store the files and the manifest; all of them, or none stays."""
        job, objects = self._job, self._tools.objects
        try:
            for label, path in files.items():
                self._lease.check()  # a worker that is told to stop still delivers what is computed
                objects.put_file(result_key(job.id, job.attempt, _file_name(label)), path)
            self._lap("store")
            manifest = manifest.model_copy(update={"timings_ms": {**self._timings, **manifest.timings_ms}})
            key = result_key(job.id, job.attempt, "manifest.json")
            objects.put_bytes(key, manifest.model_dump_json().encode())
        except BaseException:
            self._remove_stored(files)
            raise

    def _remove_stored(self, files: dict[str, Path]) -> None:
        """Remove what this attempt stored; what cannot be removed now, the reconciler finds."""
        job = self._job
        for name in ("manifest.json", *(_file_name(label) for label in files)):
            with suppress(StoreError, OSError):
                self._tools.objects.delete(result_key(job.id, job.attempt, name))

    # Keeping in touch

    def _say(self, process: Confined, message: dict[str, Any], who: str) -> None:
        try:
            process.channel.send(message, _SEND_SECONDS)
        except ChannelClosed as error:
            code, how, remedy = process.death()
            raise JobRefused(code, f"{who} {how}", remedy=remedy) from error

    def _tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Note progress for the next renewal and publish it."""
        self._lease.progress = Progress(phase=phase, done=done, total=total)
        self._tools.reporter.progress(self._job, self._lease.progress)

    def _check(self) -> None:
        """Whether to go on.

        Raises:
            WorkerStopping, JobStopped, LeaseLost: as they say.
        """
        if self._tools.stopping.is_set():
            raise WorkerStopping
        self._lease.check()

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._timings[name] = self._timings.get(name, 0.0) + 1e3 * (now - self._mark)
        self._mark = now


def _labels(request: dict[str, Any]) -> list[str]:
    return [e["label"] or e["name"] for e in request["extensions"]]


def _batches(request: dict[str, Any]) -> dict[str, None]:
    """The hashes of all batches that a request refers to, its own first, each once."""
    found = [request["batch"]["sha256"]]
    found += [referenced_batch(value) for e in request["extensions"] for value in e["options"].values()]
    return dict.fromkeys(sha256 for sha256 in found if sha256 is not None)


def _loss_function(request: dict[str, Any]) -> str | None:
    """The hash of the loss function, where the loss is one."""
    return (request["loss"] or {}).get("sha256")


def _file_name(label: str) -> str:
    return f"{label}.safetensors"


def _take(process: Confined, name: str) -> Path:
    """Take a file that a process announced.

    Raises:
        JobRefused: `internal_error` if it is not there, or the process can still change it.
    """
    try:
        return process.take(name)
    except FileNotFoundError as error:
        raise JobRefused("internal_error", f"the model's process left no file {name}") from error
    except FileInUse as error:
        raise JobRefused("internal_error", f"the model's process kept hold of what it left: {error}") from error


def _order(job: jobs.ClaimedJob) -> dict[str, Any]:
    """The job as the child takes it: what matters to the numbers, every extension with its label."""
    request = job.request
    if job.kind == JobKind.INSPECTION:
        return {"kind": job.kind, "model": request["model"], "request": {"eval": True}}
    extensions = [
        {"name": e["name"], "label": label, "options": e["options"]}
        for e, label in zip(request["extensions"], _labels(request), strict=True)
    ]
    wanted = {name: request[name] for name in ("loss", "reduction", "seed", "parameters", "eval")}
    if (loss := _loss_function(request)) is not None:
        wanted["loss"] = {"file": loss_name(loss), "output": request["loss"]["output"]}
    wanted["verify"] = request.get("verify", False)  # jobs queued before there was this field have none
    return {
        "kind": job.kind,
        "model": request["model"],
        "batch": request["batch"]["sha256"],
        "request": {**wanted, "extensions": extensions},
    }


def _refusal(reply: dict[str, Any]) -> JobRefused:
    """A child's complaint; of a code that the protocol does not know nothing is believed but the words."""
    code = reply.get("code")
    return JobRefused(
        code if isinstance(code, str) and code in FAMILIES else "internal_error",
        _text(reply, "message") or "the model's process gave no reason",
        param=_text(reply, "param"),
        remedy=_text(reply, "remedy"),
    )


def _text(message: dict[str, Any], field: str) -> str | None:
    """A text that a confined process sent, if it is one, and not endlessly long."""
    value = message.get(field)
    return value[:_MESSAGE_CHARACTERS] if isinstance(value, str) else None
