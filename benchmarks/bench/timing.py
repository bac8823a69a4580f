"""Medians of runs that alternate, so that a noisy minute hits everybody."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from benchmarks.bench.cases import Place
from benchmarks.bench.jobs import Job


@dataclass(frozen=True)
class Effort:
    """At most so many rounds, and no further one that would exceed the seconds of a cell (but one at least)."""

    rounds: int
    seconds: float


def seconds_of(job: Job, place: Place) -> float:
    """One run; what it returns is dropped outside the clock."""
    place.synchronize()
    begun = time.perf_counter()
    found = job.run(None)
    place.synchronize()
    taken = time.perf_counter() - begun
    del found
    job.release()
    return taken


def interleave(jobs: dict[str, Job], effort: Effort, place: Place) -> dict[str, list[float]]:
    """Every job's seconds, a run of each in every round; whoever begins changes."""
    runs: dict[str, list[float]] = {who: [] for who in jobs}
    order = list(jobs)
    begun = time.perf_counter()
    gc.collect()
    for done in range(effort.rounds):
        spent = time.perf_counter() - begun
        if done and spent * (done + 1) / done > effort.seconds:
            break
        for who in order[done % len(order) :] + order[: done % len(order)]:
            runs[who].append(seconds_of(jobs[who], place))
    return runs


def medians(runs: dict[str, list[float]]) -> dict[str, float]:
    return {who: median(seconds) for who, seconds in runs.items()}


def best_of(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some runs, for the machine's own figures."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)
