"""The engine in the ordinary way, as it makes the first analyses of a kind: what replays save."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job
from benchmarks.bench.ours import ours
from benchmarks.bench.works import Work
from torch import Tensor

_SWITCH = "CURVATURE_GRAPHS"


def ordinary(case: Case, work: Work) -> Job:
    job = ours(case, work)

    def run(labels: Tensor | None = None) -> Any:
        with _without_graphs():
            return job.run(labels)

    return replace(job, run=run)


@contextmanager
def _without_graphs() -> Iterator[None]:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
