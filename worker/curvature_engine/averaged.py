"""An averaged matrix where a parameter's layer ends, and its sums over the positions that share the parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature_engine.prepared_uses import PreparedUse


@dataclass(frozen=True)
class Arrangement:
    """Where a use of a parameter has its layer's outputs, whose form may move and scale them.

    Attributes:
        places: which of B̄'s rows is a group's output at a position, [groups, T, out].
        factor: what it is multiplied by.
        whole: whether they are all of B̄'s rows in their order, at one position of one group.
    """

    places: Tensor
    factor: float
    whole: bool

    @classmethod
    def of(cls, prepared: PreparedUse, arranged: Tensor) -> "Arrangement":
        """The arrangement of a use whose layer's rules have a sample's elements so: [1, T, …], numbers of B̄'s rows."""
        rule = prepared.tap.rule
        assert rule is not None
        marks = torch.cat([arranged, torch.ones_like(arranged)])
        both = rule.factor_outputs(prepared.use.role, marks)
        assert both is not None
        factor = float(both[0, 1, 0, 0])
        places = both[:, 0] / factor if factor != 0 else arranged.reshape(both[:, 0].shape)
        places = places.round().long()
        rows = torch.arange(arranged.numel(), device=places.device)
        return cls(places, factor, places.shape[:2] == (1, 1) and torch.equal(places[0, 0], rows))


@dataclass(frozen=True)
class Averaged:
    """B̄ [D, D] in a layer's output, for one use of a parameter."""

    B: Tensor
    arrangement: Arrangement

    def moment(self) -> Tensor:
        """Σ_t B̄_tt, [groups, out, out]: a tensor of its own."""
        places = self.arrangement.places
        if self.arrangement.whole:
            found = [self.B.clone()]
        elif places.shape[1] == 1:
            found = [self.B.index_select(0, p).index_select(1, p) for p in places[:, 0]]
        else:
            found = [self.B[p[:, :, None], p[:, None, :]].sum(0) for p in places]
        return _scaled(found, self.arrangement.factor)

    def summed(self) -> Tensor:
        """Σ_tt′ B̄_tt′, [groups, out, out]: a tensor of its own."""
        places = self.arrangement.places
        if places.shape[1] == 1:
            return self.moment()
        found = []
        for group in places:
            rows = self.B.new_zeros(group.shape[1], self.B.shape[1])
            for position in group:
                rows += self.B[position]
            found.append(torch.stack([rows[:, position] for position in group]).sum(0))
        return _scaled(found, self.arrangement.factor)


def _scaled(groups: list[Tensor], factor: float) -> Tensor:
    total = groups[0][None] if len(groups) == 1 else torch.stack(groups)
    return total if factor == 1 else total.mul_(factor**2)
