"""Losses that grow linearly: Huber, smooth L1, and L1."""

import torch
from torch import Tensor

from curvature_engine.losses.base import LossKind, unsupported_loss
from curvature_engine.losses.elementwise import Elementwise


class Huber(Elementwise):
    """ℓ̃ = s·½ d² where |d| < δ, else s·δ (|d| − ½ δ), d = f − t; s = 1. Columns: √s inside δ, 0 outside."""

    name = "huber"
    _scale = 1.0

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str, *, delta: float = 1.0) -> None:
        super().__init__(outputs, targets, reduction)
        self._delta = delta
        self._d = self.outputs - self.targets
        self._inside = self._d.abs() < delta

    def value(self) -> Tensor:
        linear = self._delta * (self._d.abs() - 0.5 * self._delta)
        return self._scale * torch.where(self._inside, 0.5 * self._d.square(), linear)

    def first(self) -> Tensor:
        return self._scale * self._d.clamp(-self._delta, self._delta)

    def second(self) -> Tensor:
        return self._scale * self._inside.to(self.outputs.dtype)


class SmoothL1(Huber):
    """ℓ̃ = ½ d²/β where |d| < β, else |d| − ½ β: Huber's with δ = β, divided by β."""

    name = "smooth_l1"

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str, *, beta: float = 1.0) -> None:
        super().__init__(outputs, targets, reduction, delta=beta)
        self._scale = 1.0 / beta


class L1(Elementwise):
    """ℓ̃ = |f − t|: first-order quantities only. Where f = t its derivative counts as 0, as in torch."""

    name = "l1"
    no_second_order = ("not twice differentiable", "use huber, smooth_l1 or mse, or first-order quantities only")

    def value(self) -> Tensor:
        return (self.outputs - self.targets).abs()

    def first(self) -> Tensor:
        return (self.outputs - self.targets).sign()

    def second(self) -> Tensor:
        raise unsupported_loss(f"{self.name} is not twice differentiable", "use first-order quantities only")


_THRESHOLD = {"type": "number", "exclusiveMinimum": 0, "default": 1.0}

HUBER = LossKind(
    Huber,
    "Huber's loss of outputs and targets of one shape [N, …]",
    {"delta": {**_THRESHOLD, "description": "residual from which the loss grows linearly"}},
)
SMOOTH_L1 = LossKind(
    SmoothL1,
    "smooth L1 loss of outputs and targets of one shape [N, …]",
    {"beta": {**_THRESHOLD, "description": "residual from which the loss grows linearly"}},
)
L1_LOSS = LossKind(L1, "absolute error of outputs and targets of one shape [N, …]; first-order quantities only")
