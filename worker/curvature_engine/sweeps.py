"""Several columns on their way back together, taken by all who want them: at once where that goes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from curvature_engine.columns import Columns
from curvature_engine.contributions import Contribution
from curvature_engine.stretches import Passed, Stretch
from curvature_engine.tasks import Share

Shares = dict[str, list[Share]]
"""Who is left to take something, by parameter."""


def send(
    cotangents: Tensor, columns: Columns, names: Iterable[str], shares: list[Share], advance: Callable[[], None]
) -> None:
    """Send cotangents of the outputs [k, *outputs] back, and have what they contribute to parameters taken.

    Args:
        cotangents: the k columns.
        columns: of the part that these are of.
        names: the parameters'.
        shares: who takes them.
        advance: called for each of the k that is done.
    """
    _Sweep(columns, advance).go_on(columns.at_outputs(cotangents), dict.fromkeys(names, shares), columns.stretches)


class _Sweep:
    def __init__(self, columns: Columns, advance: Callable[[], None]) -> None:
        self._columns, self._advance = columns, advance

    def go_on(self, passed: Passed, left: Mapping[str, list[Share]], stretches: Sequence[Stretch]) -> None:
        """Through stretches first."""
        if not stretches:
            self._one_by_one(passed, left)
            return
        for some in stretches[0].back(passed):
            self.go_on(some, self._stacked(some, left), stretches[1:])

    def _stacked(self, passed: Passed, left: Mapping[str, list[Share]]) -> Shares:
        """Have several columns taken at once; who is left."""
        rest = dict(left)
        for name, stacked in self._columns.stacked(passed, list(left)):
            rest[name] = [share for share in left[name] if not share.take_stacked(name, stacked)]
        return {name: shares for name, shares in rest.items() if shares}

    def _one_by_one(self, passed: Passed, left: Mapping[str, list[Share]]) -> None:
        """Have columns taken one after another."""
        expected = {name: expected_of(shares) for name, shares in left.items()}

        def take(name: str, contribution: Contribution) -> None:
            contribution.expect(expected.get(name, {}))
            for share in left.get(name, ()):
                share.take(name, contribution)

        for column in range(len(passed.columns)):
            self._columns.take_one_of(passed, column, left, take)
            self._advance()


def expected_of(shares: Sequence[Share]) -> Counter[str]:
    """Which reductions will be asked for, and how often."""
    return Counter(name for s in shares if s.samples is None for name in s.accumulator.reductions)
