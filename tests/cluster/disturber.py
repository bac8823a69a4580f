"""Kills and upsets the parts of a system at random moments."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
from tests.cluster.processes import System, find, gone, wait_until

WEIGHTS = {"worker": 3, "child": 5, "api": 2, "broker": 2, "flush": 3, "database": 1, "supervisor": 1}
"""How often each kind comes in a round; those that a system has not are left out."""

_ROLES = frozenset({"worker", "child", "api", "broker"})
_FOLLOW_SECONDS = 20.0
_BUSY_SHARE = 0.7
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Pace:
    """How the moments are drawn: after some jobs more are over, and a pause.

    By jobs, since a slow machine that is disturbed by the clock would do nothing but start again.
    """

    jobs: tuple[int, int] = (0, 5)
    pauses: tuple[float, float] = (0.0, 1.2)
    patience_seconds: float = 5.0
    """How long the jobs are waited for: if nothing moves, it goes on all the same."""


class Disturber:
    """Disturbs while its `with` lasts: rounds of all kinds, each round shuffled, at moments drawn by its pace.

    Args:
        system: what to disturb.
        seed: of order, moments and victims.
        pace: how often.
        finished: how many jobs are over.

    Attributes:
        counts: how often each kind was done.
        every_kind: set when each has been done once.
        survivors: children that outlived their killed worker.
        error: what ended it early.
    """

    def __init__(self, system: System, seed: int, pace: Pace, finished: Callable[[], int]) -> None:
        self._system, self._random, self._pace, self._finished = system, random.Random(seed), pace, finished
        self._kinds = [kind for kind in WEIGHTS if kind in _ROLES or kind in system.disturbances]
        self.counts: Counter[str] = Counter()
        self.every_kind = threading.Event()
        self.survivors: list[str] = []
        self.error: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disturber")

    def __enter__(self) -> "Disturber":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for kind in self._order():
                self._await_moment()
                if self._ended.is_set():
                    return
                self.counts[kind] += self._disturb(kind)
                if all(self.counts[kind] for kind in self._kinds):
                    self.every_kind.set()
        except Exception as error:  # noqa: BLE001 (told by whoever waits)
            self.error = error
        finally:
            self.every_kind.set()  # nobody is to wait for a thread that is over

    def _order(self) -> Iterator[str]:
        """Each kind once, and then rounds by weight."""
        while not self.every_kind.is_set():
            missing = [kind for kind in self._kinds if not self.counts[kind]]
            yield from self._random.sample(missing, len(missing))
        while True:
            yield from self._random.sample(self._kinds, sum(self._weights()), counts=self._weights())

    def _weights(self) -> list[int]:
        return [WEIGHTS[kind] for kind in self._kinds]

    def _await_moment(self) -> None:
        goal = self._finished() + self._random.randint(*self._pace.jobs)
        deadline = time.monotonic() + self._pace.patience_seconds
        while self._finished() < goal and time.monotonic() < deadline and not self._ended.wait(_LOOK_SECONDS):
            pass
        self._ended.wait(self._random.uniform(*self._pace.pauses))

    def _disturb(self, kind: str) -> bool:
        """Do it; False if there is nothing of the kind at this moment."""
        if kind not in _ROLES:
            return self._system.disturbances[kind]()
        victims = find(self._system, kind)
        if not victims:
            return False
        return self._kill(kind, self._choose(victims))

    def _choose(self, victims: list[psutil.Process]) -> psutil.Process:
        """Mostly one that is at work at this moment."""
        busy = [process for process in victims if _is_busy(process)]
        return self._random.choice(busy if busy and self._random.random() < _BUSY_SHARE else victims)

    def _kill(self, kind: str, victim: psutil.Process) -> bool:
        try:
            followers = victim.children(recursive=True) if kind == "worker" else []
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        try:
            wait_until(
                lambda: all(gone(process) for process in followers), _FOLLOW_SECONDS, "a worker's children to end"
            )
        except TimeoutError:
            self.survivors += [str(process) for process in followers if not gone(process)]
        return True


def _is_busy(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_RUNNING)
    except psutil.NoSuchProcess:
        return False
