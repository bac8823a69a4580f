"""A desk for the tests of the worker: puts models and batches into a store, files jobs, and looks at how they end."""

import hashlib
import io
import json
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save

from curvature_protocol.jobs import JobKind
from curvature_protocol.names import artefact_key, result_key
from curvature_protocol.results import Manifest
from curvature_state import Database, ObjectStore, jobs
from curvature_worker.runner import JobRunner

DEADLINE_SECONDS = 30.0


def wait_until(condition, seconds=DEADLINE_SECONDS):
    """Wait for an event; returns what made the condition true."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def script(module):
    """A module as the bytes of a TorchScript file."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


class Desk:
    def __init__(self, settings, pool, folder):
        self.settings, self.pool = settings, pool
        self.database = Database(settings.database_url)
        self.objects = ObjectStore(settings.storage_url)
        scratch = Path(folder) / "runner"
        scratch.mkdir(exist_ok=True)
        self.runner = JobRunner(settings, "tester", pool, scratch) if pool is not None else None

    def close(self):
        if self.runner is not None:
            self.runner.close()
        self.database.close()

    def store(self, kind, data):
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects.put_bytes(artefact_key(kind, sha256), data)
        return sha256

    def submit(self, model, batch, extensions=("batch_grad",), kind=JobKind.ANALYSIS, **changes):
        """File a job; returns its id. `model` is a module or bytes; `batch` a pair, or bytes."""
        data = model if isinstance(model, bytes) else script(model)
        packed = batch if isinstance(batch, bytes) else save({"inputs": batch[0], "targets": batch[1]})
        request = {
            "model": self.store("models", data),
            "batch": {"sha256": self.store("batches", packed)},
            "extensions": [
                {"label": None, "options": {}, **({"name": e} if isinstance(e, str) else e)} for e in extensions
            ],
            "loss": None,
            "reduction": "mean",
            "seed": 0,
            "parameters": "trainable",
            "eval": True,
            "timeout_seconds": None,
            "warnings": [],
            **changes,
        }
        return jobs.create_job(self.database, jobs.NewJob(request, "digest", kind=kind)).job.id

    def inspect(self, model):
        """File an inspection; returns its id."""
        data = model if isinstance(model, bytes) else script(model)
        request = {"model": self.store("models", data)}
        return jobs.create_job(self.database, jobs.NewJob(request, "digest", kind=JobKind.INSPECTION)).job.id

    def report(self, job):
        """What a plan or an inspection found."""
        return json.loads(self.objects.get_bytes(result_key(job.id, job.attempt, f"{job.kind}.json")))

    def run(self, job_id):
        """Run a job here and now, the only one that waits; returns its record."""
        assert self.runner.run_next()
        return self.job(job_id)

    def run_while(self, job_id, meddle, begun=None):
        """Run a job here; once it computes (or `begun()`), call `meddle()` from a thread.

        Returns the job's record and the seconds from then to its end. The job runs in this thread, since a child ends
        with the thread that started it.
        """
        moment = []

        def watch():
            wait_until(begun or (lambda: self.phase(job_id) in ("loading", "computing")))
            moment.append(time.monotonic())
            meddle()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        assert self.runner.run_next()
        ended = time.monotonic()
        watcher.join()
        return self.job(job_id), ended - moment[0]

    def child(self):
        """The tenant's child, by its place in the pool."""
        return self.pool._children["default"]

    def computes(self, job_id, cpu_seconds=0.3):
        """A condition: the child has worked on the job for a while."""
        begun = {}

        def condition():
            if self.phase(job_id) not in ("loading", "computing"):
                return False
            spent = sum(psutil.Process(self.child().pid).cpu_times()[:2])
            return spent - begun.setdefault("at", spent) >= cpu_seconds

        return condition

    def phase(self, job_id):
        progress = self.job(job_id).progress
        return None if progress is None else progress.phase

    def job(self, job_id):
        return jobs.get_job(self.database, job_id)

    def manifest(self, job):
        return Manifest.model_validate(
            json.loads(self.objects.get_bytes(result_key(job.id, job.attempt, "manifest.json")))
        )

    def tensors(self, job, label):
        path = self.objects.local_path(result_key(job.id, job.attempt, f"{label}.safetensors"))
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def results(self, job_id):
        """Stored keys of a job's results."""
        return [key for key, _ in self.objects.list(f"results/{job_id}")]
