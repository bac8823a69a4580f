"""The chaos run: jobs submitted, computed and read while everything dies, held against an undisturbed run."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.crowd import Crowd, Outcome
from tests.cluster.disturber import Disturber, Pace
from tests.cluster.processes import System
from tests.cluster.verdict import Verdict, judge
from tests.cluster.workload import Workload

SETTINGS = {"CURVATURE_LEASE_SECONDS": "3", "CURVATURE_RECONCILE_SECONDS": "1"}
"""A dead worker's job is taken from it after three seconds, so that a run of minutes sees it many times."""

_SAY_SECONDS = 10.0
_PACE = Pace()


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    jobs: int
    seed: int = 0
    pace: Pace = _PACE
    seconds_limit: float = 3600.0
    """After so long, whatever is not over counts as lost."""
    sharded_every: int = 10


@dataclass
class Report:
    """What a run came to."""

    jobs: int
    sharded: int
    disturbances: dict[str, int]
    seconds: float
    undisturbed_seconds: float
    succeeded: int
    refused: int
    verdict: Verdict
    problems: list[str] = field(default_factory=list)


def run_chaos(system: System, folder: Path, plan: Plan, say: Callable[[str], object] = lambda line: None) -> Report:
    """Disturb a running system while clients work with it; then do the same work undisturbed, and compare."""
    workload = Workload(folder / "models", plan.seed, sharded_every=plan.sharded_every)
    tasks = [workload.task(number) for number in range(plan.jobs)]
    begun = time.monotonic()
    crowd = _Told(system, begun + plan.seconds_limit, say)
    with Disturber(system, plan.seed, plan.pace, lambda: crowd.finished) as disturber:
        crowd.counts = disturber.counts
        disturbed = crowd.run(tasks, lambda: disturber.every_kind.wait(plan.seconds_limit))
    seconds = time.monotonic() - begun
    say(f"disturbed: {plan.jobs} jobs in {seconds:.0f} s; {dict(disturber.counts)}")
    begun = time.monotonic()
    undisturbed = _Told(system, begun + plan.seconds_limit, say).run(tasks)
    undisturbed_seconds = time.monotonic() - begun
    say(f"undisturbed: {plan.jobs} jobs in {undisturbed_seconds:.0f} s")
    verdict = judge(system, disturbed, undisturbed)
    return Report(
        jobs=plan.jobs,
        sharded=sum(task.parts > 0 for task in tasks),
        disturbances=dict(disturber.counts),
        seconds=seconds,
        undisturbed_seconds=undisturbed_seconds,
        succeeded=_count(disturbed, "succeeded"),
        refused=_count(disturbed, "failed"),
        verdict=verdict,
        problems=[*_own_problems(disturber), *verdict.problems],
    )


class _Told(Crowd):
    """A crowd that says every few seconds how far it is."""

    def __init__(self, system: System, deadline: float, say: Callable[[str], object]) -> None:
        super().__init__(system.urls, deadline)
        self.counts: Counter[str] = Counter()
        self._say, self._said_at = say, time.monotonic()

    def note(self) -> None:
        super().note()
        if time.monotonic() - self._said_at > _SAY_SECONDS:
            self._said_at = time.monotonic()
            self._say(f"{self.finished} jobs over; {dict(self.counts)}")


def _count(outcomes: list[Outcome], status: str) -> int:
    return sum(outcome.status == status for outcome in outcomes)


def _own_problems(disturber: Disturber) -> list[str]:
    found = [f"outlived its killed worker: {process}" for process in disturber.survivors]
    if disturber.error is not None:
        found.append(f"the disturber ended early: {disturber.error!r}")
    return found
