"""Squared error."""

import torch
from torch import Tensor

from curvature_engine.losses.base import LossKind
from curvature_engine.losses.elementwise import Elementwise


class SquaredError(Elementwise):
    """ℓ̃ = (f − t)². Sampled as from a Normal of variance ½ around f: E s̃ s̃ᵀ = 2 I."""

    name = "mse"

    def value(self) -> Tensor:
        return (self.outputs - self.targets).square()

    def first(self) -> Tensor:
        return 2.0 * (self.outputs - self.targets)

    def second(self) -> Tensor:
        return torch.full_like(self.outputs, 2.0)


MSE = LossKind(SquaredError, "squared error of outputs and targets of one shape [N, …]")
