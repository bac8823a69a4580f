"""An averaged matrix where a parameter's layer ends, and its sums over the positions that share the parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Averaged:
    """B̄ [D, D] in a layer's output, as the parameter's Kronecker form sees it.

    Attributes:
        places: which of B̄'s rows is a group's output at a position: [groups, T, out].
        factor: what the form multiplies outputs by (a bias that is added several times over).
    """

    B: Tensor
    places: Tensor
    factor: float

    def moment(self) -> Tensor:
        """Σ_t B̄_tt, [groups, out, out]: a tensor of its own."""
        if self.places.shape[1] == 1:
            found = [_picked(self.B, p) for p in self.places[:, 0]]
        else:
            found = [self.B[p[:, :, None], p[:, None, :]].sum(0) for p in self.places]
        total = found[0][None] if len(found) == 1 else torch.stack(found)
        return total if self.factor == 1 else total.mul_(self.factor**2)

    def summed(self) -> Tensor:
        """Σ_tt′ B̄_tt′, [groups, out, out]: a tensor of its own."""
        if self.places.shape[1] == 1:
            return self.moment()
        found = []
        for places in self.places:
            rows = self.B.new_zeros(places.shape[1], self.B.shape[1])
            for position in places:
                rows += self.B[position]
            found.append(torch.stack([rows[:, position] for position in places]).sum(0))
        return torch.stack(found).mul_(self.factor**2)


def _picked(B: Tensor, places: Tensor) -> Tensor:
    """Rows and columns of B, in a tensor of its own."""
    if len(places) == len(B) and torch.equal(places, torch.arange(len(B), device=places.device)):
        return B.clone()
    return B.index_select(0, places).index_select(1, places)
