"""An averaged matrix where a parameter's layer ends, and its sums over the positions that share the parameter."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvature_engine.prepared_uses import PreparedUse


@dataclass(frozen=True)
class Averaged:
    """B̄ [D, D] in a layer's output, for one use of a parameter, whose form may move and scale the output.

    Attributes:
        arranged: where the layer's rules have a sample's elements: [1, T, …], numbers of B̄'s rows as float64.
    """

    B: Tensor
    prepared: PreparedUse
    arranged: Tensor

    def moment(self) -> Tensor:
        """Σ_t B̄_tt, [groups, out, out]: a tensor of its own."""
        places, factor = self._form
        if places.shape[1] == 1:
            found = [_picked(self.B, p) for p in places[:, 0]]
        else:
            found = [self.B[p[:, :, None], p[:, None, :]].sum(0) for p in places]
        return _scaled(found, factor)

    def summed(self) -> Tensor:
        """Σ_tt′ B̄_tt′, [groups, out, out]: a tensor of its own."""
        places, factor = self._form
        if places.shape[1] == 1:
            return self.moment()
        found = []
        for group in places:
            rows = self.B.new_zeros(group.shape[1], self.B.shape[1])
            for position in group:
                rows += self.B[position]
            found.append(torch.stack([rows[:, position] for position in group]).sum(0))
        return _scaled(found, factor)

    @cached_property
    def _form(self) -> tuple[Tensor, float]:
        """Which of B̄'s rows is a group's output at a position, [groups, T, out], and what it is multiplied by."""
        rule = self.prepared.tap.rule
        assert rule is not None
        marks = torch.cat([self.arranged, torch.ones_like(self.arranged)])
        both = rule.factor_outputs(self.prepared.use.role, marks)
        assert both is not None
        factor = float(both[0, 1, 0, 0])
        places = both[:, 0] / factor if factor != 0 else self.arranged.reshape(both[:, 0].shape)
        return places.round().long(), factor


def _picked(B: Tensor, places: Tensor) -> Tensor:
    """Rows and columns of B, in a tensor of its own."""
    if len(places) == len(B) and torch.equal(places, torch.arange(len(B), device=places.device)):
        return B.clone()
    return B.index_select(0, places).index_select(1, places)


def _scaled(groups: list[Tensor], factor: float) -> Tensor:
    total = groups[0][None] if len(groups) == 1 else torch.stack(groups)
    return total if factor == 1 else total.mul_(factor**2)
