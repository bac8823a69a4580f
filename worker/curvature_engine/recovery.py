"""What to do when memory runs out although a plan said it would not: go on in smaller pieces.

A block of individual gradients that cannot be written out is written out in halves. Anything else begins again, with
half the samples per chunk and half as large blocks, until one sample by itself does not fit.
"""

from dataclasses import dataclass, field, replace

from curvature_engine.budget import Budget
from curvature_engine.plans import Plan
from curvature_engine.preparation import Limits


@dataclass(frozen=True)
class Attempt:
    """One attempt at an analysis: what it may use, and what was learned before it."""

    budget: Budget
    limits: Limits = field(default_factory=Limits)
    notes: tuple[str, ...] = ()

    def next(self, N: int, plan: Plan | None) -> "Attempt | None":
        """The attempt after this one ran out of memory, under `plan` if it got that far; None if nothing is smaller."""
        samples = (self.limits.samples or N) if plan is None else plan.samples_per_chunk
        # Samples by themselves cannot be probed; that they are not coupled must have been seen before.
        probed = self.limits.least == 1 or (plan is not None and plan.samples_per_chunk > 1)
        budget = self.budget.with_smaller_blocks()
        divisible = plan is None or plan.whole_reason is None
        if divisible and samples // 2 >= (1 if probed else 2):
            half = samples // 2
            limits = Limits(half, 1 if half == 1 else self.limits.least)
            note = f"memory ran out with {samples} samples at a time: the analysis began again with {half}"
            return replace(self, budget=budget, limits=limits, notes=(*self.notes, note))
        if plan is not None and any(p.samples_per_block > 1 for r in plan.requests for p in r.parameters):
            note = f"memory ran out: the analysis began again with blocks of {budget.block_bytes} bytes"
            return replace(self, budget=budget, notes=(*self.notes, note))
        return None
