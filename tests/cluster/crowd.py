"""Clients that submit tasks, wait for them and read the results, whatever happens to the servers meanwhile."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import numpy as np
from tests.cluster.workload import Task

from curvature_client import Client, CurvatureError, Job, Result
from curvature_protocol.results import Manifest

_RETRIES = 20
_BURST = 8
_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


@dataclass
class Outcome:
    """What a client was told of its task."""

    task: Task
    job_id: str | None = None
    status: str = "not submitted"
    code: str | None = None
    trouble: str | None = None
    """What kept the client from learning more."""
    digests: dict[str, str] = field(default_factory=dict)
    """`{label}/{tensor}` → SHA-256 of its bytes."""
    manifest: Manifest | None = None


class Crowd:
    """Several clients at once, spread over the servers' addresses.

    Args:
        urls: the addresses.
        deadline: when, by the monotonic clock, they stop waiting.
        clients: how many work at a time.
    """

    def __init__(self, urls: Sequence[str], deadline: float, clients: int = 6) -> None:
        self._urls, self._deadline, self._clients = urls, deadline, clients
        self.finished = 0
        self._lock = threading.Lock()

    def run(self, tasks: Sequence[Task], may_end: Callable[[], object] = lambda: None) -> list[Outcome]:
        """Submit all tasks in bursts and see each to its end; before the last bursts, `may_end` is waited for."""
        bursts = [tasks[first : first + _BURST] for first in range(0, len(tasks), _BURST)]
        held_back = max(1, len(bursts) // 10)
        with ExitStack() as stack, ThreadPoolExecutor(self._clients) as pool:
            clients = [
                stack.enter_context(Client(url, max_retries=_RETRIES, timeout=_TIMEOUT, progress=False))
                for url in self._urls
            ]

            def see_to(place: int) -> list[Outcome]:
                if place >= len(bursts) - held_back:
                    may_end()
                return self._burst(clients[place % len(clients)], bursts[place])

            return [outcome for outcomes in pool.map(see_to, range(len(bursts))) for outcome in outcomes]

    def _burst(self, client: Client, tasks: Sequence[Task]) -> list[Outcome]:
        submitted = [self._submit(client, task) for task in tasks]
        for outcome, job in submitted:
            if job is not None:
                self._follow(outcome, job)
            with self._lock:
                self.note()
        return [outcome for outcome, _ in submitted]

    def note(self) -> None:
        """Called after each task that is over, by one client at a time."""
        self.finished += 1

    def _submit(self, client: Client, task: Task) -> tuple[Outcome, Job | None]:
        outcome = Outcome(task)
        try:
            job = client.submit(task.model, task.batch, task.extensions, cache=False, **task.options)
        except CurvatureError as error:
            outcome.trouble = f"submitting: {type(error).__name__}: {error}"
            return outcome, None
        outcome.job_id, outcome.status = job.id, "promised"
        return outcome, job

    def _follow(self, outcome: Outcome, job: Job) -> None:
        try:
            job.wait(max(1.0, self._deadline - time.monotonic()))
            outcome.status = job.status
            if job.error is not None:
                outcome.code, outcome.trouble = job.error.code, str(job.error)
            if job.status == "succeeded":
                result = job.result()
                outcome.digests, outcome.manifest = digests(result), result.manifest
        except CurvatureError as error:
            outcome.trouble = f"{job.status}: {type(error).__name__}: {error}"


def digests(result: Result) -> dict[str, str]:
    """`{label}/{tensor}` → a digest of its bytes; all of them are read from the server."""
    found = {}
    for group in result.manifest.groups:
        for entry in group.tensors:
            value = result[group.label]
            if entry.parameter is not None:
                value = value[entry.parameter]
            if entry.factor is not None:
                value = getattr(value, entry.factor)
            found[f"{group.label}/{entry.name}"] = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
    return found
