"""What was asked of one program: the order that preparation, passes and provenance work by."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from curvature_engine.budget import Budget
from curvature_engine.closed_form import Relief
from curvature_engine.extensions import Against
from curvature_engine.parts import DataSetPart
from curvature_engine.program import Program
from curvature_engine.requests import Request

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """What was asked of one program, and what is noticed on the way."""

    program: Program
    requests: list[Request]
    seed: int
    progress: Progress | None
    budget: Budget
    verify: bool = False
    part: DataSetPart | None = None
    precision: str = "float32"
    channels_last: bool = False
    warnings: list[str] = field(default_factory=list)
    against: dict[str, Against] = field(default_factory=dict)
    """By label: the other batches of requests that name one."""
    relief: Relief = field(default_factory=Relief)
    judged: set[Hashable] = field(default_factory=set)
    """Paths whose kept verdicts are this order's own, from an earlier part, another batch or a failed attempt."""

    @property
    def is_reordered(self) -> bool:
        """Whether numbers are made in another way than by default, so that their difference is to be told."""
        return self.precision != "float32" or self.channels_last
