"""Seconds of something on a device."""

import time
from collections.abc import Callable
from statistics import median

from benchmarks.bench.cases import Place


def seconds(run: Callable[[], object], place: Place, times: int = 7) -> float:
    """The median of some runs, after one that does not count."""
    run()
    found = []
    for _ in range(times):
        place.synchronize()
        begun = time.perf_counter()
        run()
        place.synchronize()
        found.append(time.perf_counter() - begun)
    return median(found)


def once(run: Callable[[], object], place: Place) -> float:
    """Of one run."""
    place.synchronize()
    begun = time.perf_counter()
    run()
    place.synchronize()
    return time.perf_counter() - begun
