"""One cell: one net, one batch, one work; everybody's results compared, then everybody timed."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.equality import Differs, check
from benchmarks.bench.floors import floors
from benchmarks.bench.gradient import unit
from benchmarks.bench.jobs import Job, Results, reason
from benchmarks.bench.ours import drawn_labels, ours
from benchmarks.bench.peers import PEERS
from benchmarks.bench.timing import Effort, interleave, medians
from benchmarks.bench.works import Work
from torch import Tensor

UNIT = "unit"


@dataclass
class Cell:
    """What was found. `seconds` are medians, by who; `unit` is the plain gradient."""

    net: str
    N: int
    classes: int
    work: str
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    @property
    def gradients(self) -> dict[str, float]:
        """Everybody's time in units of one gradient."""
        return {who: s / self.seconds[UNIT] for who, s in self.seconds.items() if who != UNIT}

    @property
    def ratios(self) -> dict[str, float]:
        """Peer's time / ours."""
        return {who: s / self.seconds["ours"] for who, s in self.seconds.items() if who not in (UNIT, "ours")}

    @property
    def rounds(self) -> dict[str, int]:
        """How often everybody ran."""
        return {who: len(seconds) for who, seconds in self.runs.items()}

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gradients": self.gradients, "ratios": self.ratios, "rounds": self.rounds}


def measure(case: Case, work: Work, peers: list[str], effort: Effort, bandwidth: float) -> Cell:
    """Compare, then time."""
    cell = Cell(case.name, case.N, case.classes, work.name)
    with _quiet():
        jobs = _compared(case, work, peers, cell)
        if "ours" not in jobs:
            return cell
        unit_job = unit(case)
        unit_job.run(None)
        cell.runs = interleave({UNIT: unit_job, **jobs}, effort, case.place)
        cell.seconds = medians(cell.runs)
        cell.floors = floors(case, work, cell.seconds[UNIT], bandwidth)
    return cell


def _compared(case: Case, work: Work, peers: list[str], cell: Cell) -> dict[str, Job]:
    """Who can, and agrees; by the way everybody is warm."""
    jobs: dict[str, Job] = {}
    try:
        job = ours(case, work)
        mine = job.read(job.run(None))
        jobs["ours"] = job
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells are measured
        cell.wrong["ours"] = reason(error)
        return {}
    labels = drawn_labels(case) if work.sampled else None
    for peer in peers:
        try:
            job = PEERS[peer](case, work)
            cell.errors[peer] = _agrees(job, mine, labels, case)
            jobs[peer] = job
        except Differs as error:
            cell.wrong[peer] = str(error)
        except Exception as error:  # noqa: BLE001 - peers refuse with errors of every kind
            cell.unable[peer] = reason(error)
        gc.collect()
    return jobs


def _agrees(job: Job, mine: Results, labels: Tensor | None, case: Case) -> float:
    try:
        return check(mine, job.read(job.run(labels)), case.place.dtype)
    finally:
        job.release()


@contextmanager
def _quiet() -> Iterator[None]:
    """Peers warn of what is no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
