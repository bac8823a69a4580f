"""Mean and spread of individual gradients, of several groups of samples as of one."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution


@dataclass(frozen=True)
class Moments:
    """Of the gradients of n samples.

    Attributes:
        mean: Σ g/n, [*p].
        spread: Σ (g − mean)², entry by entry [*p], or of all entries together [].
    """

    n: int
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, contribution: Contribution, n: int) -> "Moments":
        """Those of a contribution with n samples."""
        return cls(n, *contribution.moments())

    def in_all(self) -> "Moments":
        """With the spread of all entries together, in float64."""
        return replace(self, spread=self.spread.sum(dtype=torch.float64))

    def joined(self, other: "Moments") -> "Moments":
        """Of both groups of samples together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        n = self.n + other.n
        shift = other.mean - self.mean
        between = shift.square()
        if self.spread.dim() < between.dim():
            between = between.sum(dtype=self.spread.dtype)
        return Moments(
            n, self.mean + shift * (other.n / n), self.spread + other.spread + between * (other.n * self.n / n)
        )
