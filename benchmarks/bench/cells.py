"""One cell: one net, one batch, one work; everybody's results compared, then everybody timed."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.equality import Differs, check
from benchmarks.bench.floors import floors
from benchmarks.bench.gradient import unit
from benchmarks.bench.jobs import Job, Results, reason
from benchmarks.bench.ours import drawn_labels, ours
from benchmarks.bench.peers import PEERS
from benchmarks.bench.timing import Effort, interleave, medians, seconds_of
from benchmarks.bench.works import Work

UNIT = "unit"
WARM = {"cuda": 3, "cpu": 7}
"""Runs of everybody on CUDA, and of the engine on CPUs, before it is timed, beside the one that is compared: as often
as the engine takes to capture what comes again and again."""
MOST_SECONDS = 1.0
"""On CPUs, of what is captured, and more: what takes longer is warm."""


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
    in_float64: dict[str, float] = field(default_factory=dict)
    """Errors once more, of peers that differ by more than float32's rounding; by how much in float64."""
    unable: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """What the first run allocated at its peak, beside what was there; on CUDA."""

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
        with _peak(case, cell, "ours"):
            found = job.run(None)
        mine = job.read(found)
        jobs["ours"] = job
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells are measured
        cell.wrong["ours"] = reason(error)
        return {}
    labels = drawn_labels(case) if work.sampled else None
    for peer in peers:
        try:
            job = PEERS[peer](case, work)
            with _peak(case, cell, peer):
                found = job.run(labels)
            cell.errors[peer] = _agrees(job, found, mine, case)
            jobs[peer] = job
        except Differs as error:
            exactly = _error_in_float64(peer, case, work)
            if error.by is None or exactly is None:
                cell.wrong[peer] = str(error)
                continue
            jobs[peer], cell.errors[peer], cell.in_float64[peer] = job, error.by, exactly
        except Exception as error:  # noqa: BLE001 - peers refuse with errors of every kind
            cell.unable[peer] = reason(error)
        gc.collect()
    _warm(jobs, mine, cell, case)
    return jobs


def _warm(jobs: dict[str, Job], mine: Results, cell: Cell, case: Case) -> None:
    """Run until what comes again and again is captured; what is replayed must agree."""
    device = case.place.device.type
    for number in range(WARM[device]):
        for job in jobs.values() if device == "cuda" else [jobs["ours"]]:
            seconds = seconds_of(job, case.place)
            if device == "cpu" and number == 0 and seconds > MOST_SECONDS:
                return
    try:
        check(mine, jobs["ours"].read(jobs["ours"].run(None)), case.place.dtype)
    except Differs as error:
        cell.wrong["ours"] = f"replayed: {error}"


def _agrees(job: Job, found: Any, mine: Results, case: Case) -> float:
    try:
        return check(mine, job.read(found), case.place.dtype)
    finally:
        job.release()


def _error_in_float64(peer: str, case: Case, work: Work) -> float | None:
    """By how much a peer differs in float64, our images channels last as they are in float32; None if by too much.

    A ReLU whose input is a rounding error from zero passes a sample's gradient with one order of additions and not
    with another. In float64 such a one is not met.
    """
    if case.place.dtype != torch.float32:
        return None
    exact = replace(case, place=replace(case.place, dtype=torch.float64))
    torch.set_default_dtype(torch.float64)  # BackPACK makes the layers of its own by it
    try:
        job = ours(exact, work, channels_last=exact.of_images)
        labels = drawn_labels(exact) if work.sampled else None
        theirs = PEERS[peer](exact, work)
        return _agrees(theirs, theirs.run(labels), job.read(job.run(None)), exact)
    except Exception:  # noqa: BLE001 - who cannot has not shown that he agrees
        return None
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _peak(case: Case, cell: Cell, who: str) -> Iterator[None]:
    """Note what is allocated at the peak of a run."""
    if case.place.device.type != "cuda":
        yield
        return
    before = torch.cuda.memory_allocated(case.place.device)
    torch.cuda.reset_peak_memory_stats(case.place.device)
    yield
    cell.peak_bytes[who] = torch.cuda.max_memory_allocated(case.place.device) - before


@contextmanager
def _quiet() -> Iterator[None]:
    """Peers warn of what is no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
