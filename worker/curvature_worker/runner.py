"""One job's way through the worker: claim, fetch, admit, compute, check, store, finish."""

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import redis

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import JobStatus, Progress
from curvature_protocol.names import admitted_key, result_key
from curvature_state import Database, ObjectStore, jobs
from curvature_state.events import publish
from curvature_worker.admission import ADMISSION_VERSION
from curvature_worker.cache import ArtefactCache, place
from curvature_worker.channel import ChannelClosed
from curvature_worker.errors import JobRefused, JobStopped, LeaseLost, WorkerStopping
from curvature_worker.launcher import Confined, launch
from curvature_worker.manifest import build_manifest
from curvature_worker.pool import ChildPool
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_ADMISSION_SECONDS = 300.0


class JobRunner:
    """Runs jobs, one at a time."""

    def __init__(self, settings: WorkerSettings, worker_id: str, pool: ChildPool, scratch: Path) -> None:
        self._settings, self._worker_id, self._pool, self._scratch = settings, worker_id, pool, scratch
        self._database = Database(settings.database_url)
        self._objects = ObjectStore(settings.storage_url)
        self._cache = ArtefactCache(self._objects, scratch / "cache", settings.cache_bytes)
        self._redis = redis.Redis.from_url(settings.redis_url, socket_connect_timeout=2)
        self.stopping = Event()

    def run(self, job_id: str) -> None:
        """Run a job if it can be claimed; whatever happens, its row says how it ended."""
        if self.stopping.is_set():
            return
        job = jobs.claim(self._database, job_id, self._worker_id, self._settings.lease_seconds)
        if job is None:
            return
        attempt = _Attempt(self, job)
        attempt.announce(JobStatus.RUNNING)
        try:
            attempt.run()
        except JobRefused as error:
            problem = jobs.problem(error.code, error.detail, param=error.param, remedy=error.remedy)
            if jobs.fail(self._database, job.id, job.attempt, problem):
                attempt.announce(JobStatus.FAILED)
        except JobStopped:
            if jobs.confirm_cancel(self._database, job.id, job.attempt):
                attempt.announce(JobStatus.CANCELLED)
        except WorkerStopping:
            if jobs.release(self._database, job.id, job.attempt):
                logger.info("job %s handed back", job.id)
        except LeaseLost:
            logger.warning("job %s is no longer ours", job.id)
        except Exception:
            logger.exception("job %s failed in the worker", job.id)
            problem = jobs.problem("internal_error", "the worker failed; the operator finds the cause in its log")
            if jobs.fail(self._database, job.id, job.attempt, problem):
                attempt.announce(JobStatus.FAILED)

    def close(self) -> None:
        """Close connections."""
        self._redis.close()
        self._database.close()


class _Attempt:
    """One attempt at one job."""

    def __init__(self, runner: JobRunner, job: jobs.ClaimedJob) -> None:
        self._runner, self._job = runner, job
        self._settings = runner._settings
        self._timings: dict[str, float] = {"queue": 1e3 * (datetime.now(UTC) - job.created_at).total_seconds()}
        self._mark = time.perf_counter()
        self._renewed_at = self._looked_at = self._told_at = time.monotonic()
        self._progress = Progress(phase="fetching")
        timeout = job.request.get("timeout_seconds")
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def run(self) -> None:
        """From the claim to the stored result.

        Raises:
            JobRefused, JobStopped, LeaseLost, WorkerStopping: as they say.
        """
        request, cache, pool = self._job.request, self._runner._cache, self._runner._pool
        child = pool.acquire(self._job.tenant)
        model = self._admitted(request["model"])
        batch = cache.fetch_upload("batches", request["batch"]["sha256"])
        place(model, child.inbox / request["model"])
        place(batch, child.inbox / request["batch"]["sha256"])
        self._lap("fetch")
        reply = self._compute(child)
        self._lap("child")
        self._store(reply, child)

    # Steps

    def _admitted(self, sha256: str) -> Path:
        """The admitted form of the model, made now if this is its first job."""
        cache, objects = self._runner._cache, self._runner._objects
        key = admitted_key(sha256, ADMISSION_VERSION)
        found = cache.fetch(key)
        if found is not None:
            return found
        self._tell("admitting")
        source = cache.fetch_upload("models", sha256)
        judge = launch("curvature_worker.admission", scratch=self._runner._scratch, options={})
        try:
            place(source, judge.inbox / "model")
            verdict = self._listen(judge, {"admitted", "refused"}, "admission of the model")
            if verdict["event"] == "refused":
                raise JobRefused("invalid_model", str(verdict["message"]), param="model", remedy=verdict.get("remedy"))
            objects.put_file(key, judge.outbox / "admitted")
        finally:
            judge.kill()
        self._lap("admit")
        admitted = cache.fetch(key)
        if admitted is None:
            raise JobRefused("internal_error", "the admitted model was not stored")
        return admitted

    def _compute(self, child: Confined) -> dict[str, Any]:
        request = self._job.request
        order = {"model": request["model"], "batch": request["batch"]["sha256"], "request": _completed(request)}
        try:
            child.channel.send(order)
            reply = self._listen(child, {"done", "error"}, "the model's process")
        except (JobStopped, LeaseLost, WorkerStopping, JobRefused, ChannelClosed):
            self._runner._pool.discard(self._job.tenant)
            raise
        finally:
            (child.inbox / request["batch"]["sha256"]).unlink(missing_ok=True)
        if reply["event"] == "error":
            raise JobRefused(
                str(reply["code"]), str(reply["message"]), param=reply.get("param"), remedy=reply.get("remedy")
            )
        return reply

    def _listen(self, child: Confined, wanted: set[str], who: str) -> dict[str, Any]:
        """Wait for the child's word, keeping the lease, and an eye on cancellation and time."""
        while True:
            try:
                message = child.channel.receive(self._settings.poll_seconds)
            except ChannelClosed as error:
                raise JobRefused(
                    "worker_crashed",
                    f"{who} {child.obituary()}",
                    remedy="try a smaller batch; if it persists, report the model",
                ) from error
            if message is not None and message.get("event") in wanted:
                return message
            if message is not None and message.get("event") == "progress":
                self._tell("computing", int(message["done"]), int(message["total"]))
            self._look_around()

    def _store(self, reply: dict[str, Any], child: Confined) -> None:
        job, runner = self._job, self._runner
        labels = [e["label"] or e["name"] for e in job.request["extensions"]]
        manifest = build_manifest(
            reply,
            child.outbox,
            labels,
            job_id=job.id,
            attempt=job.attempt,
            isolation=str(runner._pool.greeting["isolation"]),
            warnings=list(job.request.get("warnings", [])),
            timings_ms=self._timings,
        )
        for label in labels:
            name = f"{label}.safetensors"
            runner._objects.put_file(result_key(job.id, job.attempt, name), child.outbox / name)
        self._lap("store")
        manifest = manifest.model_copy(update={"timings_ms": {**manifest.timings_ms, **self._timings}})
        key = result_key(job.id, job.attempt, "manifest.json")
        runner._objects.put_bytes(key, manifest.model_dump_json().encode())
        if not jobs.succeed(runner._database, job.id, job.attempt, manifest.warnings):
            raise LeaseLost
        self.announce(JobStatus.SUCCEEDED)

    # Keeping in touch

    def announce(self, status: JobStatus) -> None:
        """Publish a change of state."""
        found = jobs.get_job(self._runner._database, self._job.id) if status == JobStatus.FAILED else None
        publish(
            self._runner._redis,
            JobEvent(
                event="state",
                job_id=self._job.id,
                status=status,
                at=datetime.now(UTC),
                attempt=self._job.attempt,
                error=None if found is None else found.error,
            ),
        )

    def _tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Publish progress, not too often."""
        self._progress = Progress(phase=phase, done=done, total=total)
        now = time.monotonic()
        if now - self._told_at < 0.1 and done < total:
            return
        self._told_at = now
        publish(
            self._runner._redis,
            JobEvent(
                event="progress",
                job_id=self._job.id,
                status=JobStatus.RUNNING,
                at=datetime.now(UTC),
                attempt=self._job.attempt,
                progress=self._progress,
            ),
        )

    def _look_around(self) -> None:
        """Renew the lease, and see whether the job is still wanted."""
        now = time.monotonic()
        if self._runner.stopping.is_set():
            raise WorkerStopping
        if self._deadline is not None and now > self._deadline:
            limit = self._job.request["timeout_seconds"]
            raise JobRefused(
                "job_timeout", f"the job ran longer than its limit of {limit} s", remedy="raise timeout_seconds"
            )
        if now - self._looked_at < self._settings.poll_seconds:
            return
        self._looked_at = now
        database, job = self._runner._database, self._job
        if now - self._renewed_at >= self._settings.renew_seconds:
            self._renewed_at = now
            status = jobs.renew(database, job.id, job.attempt, self._settings.lease_seconds, self._progress)
        else:
            status = jobs.peek(database, job.id, job.attempt)
        if status is None:
            raise LeaseLost
        if status == JobStatus.CANCELLING:
            raise JobStopped

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._timings[name] = self._timings.get(name, 0.0) + 1e3 * (now - self._mark)
        self._mark = now


def _completed(request: dict[str, Any]) -> dict[str, Any]:
    """The request as the child takes it: every extension with its label."""
    extensions = [{**e, "label": e["label"] or e["name"]} for e in request["extensions"]]
    return {**request, "extensions": extensions}
