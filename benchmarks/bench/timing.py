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
    """At most so many rounds; everybody has an equal share of a cell's seconds, and runs once in any case."""

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
    """Every job's seconds: rounds with a run of each whose share is not used up; whoever begins changes."""
    runs: dict[str, list[float]] = {who: [] for who in jobs}
    share = effort.seconds / len(jobs)
    order = list(jobs)
    gc.collect()
    for done in range(effort.rounds):
        for who in order[done % len(order) :] + order[: done % len(order)]:
            if _has_time(runs[who], share):
                runs[who].append(seconds_of(jobs[who], place))
    return runs


def _has_time(runs: list[float], share: float) -> bool:
    """For one more, if it takes as long as those before."""
    return not runs or sum(runs) + sum(runs) / len(runs) <= share


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
