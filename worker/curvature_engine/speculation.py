"""What the host reads of a device on the way through an analysis, and what goes on without reading it.

A host that reads a number waits for all that it asked of the device before. What a warm analysis reads are answers:
whether every class exists, whether the outputs are finite. A *recorded* run notes them, in order. A *speculating* run
reads nothing: it takes the same answers again, and notes on the device whether they still hold. So it can be captured
as a CUDA graph and replayed on other batches (`replays`): a replay whose answers do not hold counts for nothing.

Seeds are numbers that go the other way. A speculating run has them come from the device's memory, where a replay puts
others.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

MOST_SEEDS = 1024
"""Numbers made of the seed in one run."""


class Unspeculative(Exception):
    """A run that asks otherwise than the recorded one did, or more than can be noted."""


class _Mode(threading.local):
    """Of the thread's analysis in progress: at most one of the two."""

    recorded: list[bool] | None = None
    speculation: "Speculation | None" = None


_MODE = _Mode()


class Speculation:
    """One run that takes its answers from a recorded one.

    Args:
        answers: the recorded ones, in order.
        seeds: int64 on the device, [MOST_SEEDS]: where numbers made of the seed lie.

    Attributes:
        seeded: how each number in `seeds` follows from a seed.
    """

    def __init__(self, answers: list[bool], seeds: Tensor) -> None:
        self._answers, self._seeds = answers, seeds
        self._holding: list[Tensor] = []
        self.seeded: list[Callable[[int], int]] = []

    def answer(self, question: Tensor) -> bool:
        if len(self._holding) == len(self._answers):
            raise Unspeculative("more was read than before")
        found = self._answers[len(self._holding)]
        self._holding.append(question if found else ~question)
        return found

    def sent(self, make: Callable[[int], int]) -> Tensor:
        if len(self.seeded) == MOST_SEEDS:
            raise Unspeculative("too many numbers are made of the seed")
        self.seeded.append(make)
        return self._seeds[len(self.seeded) - 1]

    def holds(self) -> Tensor:
        """Whether all answers are those of the recorded run, on the device: when the run is over."""
        if len(self._holding) != len(self._answers):
            raise Unspeculative("less was read than before")
        return torch.stack(self._holding).all() if self._holding else self._seeds.new_ones((), dtype=torch.bool)


def answer(question: Tensor) -> bool:
    """Whether a boolean (zero-dimensional) is true; waits for the device, except where a run speculates."""
    if _MODE.speculation is not None:
        return _MODE.speculation.answer(question)
    found = bool(question)
    if _MODE.recorded is not None:
        _MODE.recorded.append(found)
    return found


def answers(questions: Sequence[Tensor]) -> list[bool]:
    """`answer` to several questions, waiting once."""
    if _MODE.speculation is not None:
        return [_MODE.speculation.answer(question) for question in questions]
    found: list[bool] = torch.stack(list(questions)).tolist() if questions else []
    if _MODE.recorded is not None:
        _MODE.recorded += found
    return found


def sent(make: Callable[[int], int], seed: int) -> int | Tensor:
    """`make(seed)`, or where a run speculates a number on the device that a replay makes of its own seed."""
    return make(seed) if _MODE.speculation is None else _MODE.speculation.sent(make)


def speculates() -> bool:
    """Whether this thread's run does. What it makes on the device may not be there yet, so nothing of it is kept."""
    return _MODE.speculation is not None


def reads(what: str) -> None:
    """Say that a tensor's numbers are about to be read past torch's dispatcher.

    Raises:
        Unspeculative: this thread's run speculates.
    """
    if _MODE.speculation is not None:
        raise Unspeculative(f"{what} reads a tensor")


@contextmanager
def recording() -> Iterator[list[bool]]:
    """Note this thread's answers, as long as it lasts."""
    answers: list[bool] = []
    _MODE.recorded, before = answers, _MODE.recorded
    try:
        yield answers
    finally:
        _MODE.recorded = before


@contextmanager
def speculating(answers: list[bool], seeds: Tensor) -> Iterator[Speculation]:
    """Have this thread speculate, as long as it lasts."""
    if _MODE.speculation is not None:
        raise Unspeculative("a run within a run")
    _MODE.speculation, recorded, _MODE.recorded = Speculation(answers, seeds), _MODE.recorded, None
    try:
        yield _MODE.speculation
    finally:
        _MODE.speculation, _MODE.recorded = None, recorded
