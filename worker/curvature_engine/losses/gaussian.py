"""Negative log-likelihood of a Normal with given variance around the outputs."""

import math
from typing import Any

from torch import Tensor

from curvature_engine.losses.base import LossKind
from curvature_engine.losses.elementwise import NUMBERS, Elementwise


class GaussianNLL(Elementwise):
    """ℓ̃ = ½ (log v + (f − t)²/v), v = max(var, eps); with `full` plus ½ log 2π.

    The variance is a constant: the outputs are means. Columns: 1/√v. Sampled: its gradient at t ~ Normal(f, v).
    """

    name = "gaussian_nll"

    def __init__(
        self, outputs: Tensor, targets: Tensor, reduction: str, *, var: Any = 1.0, eps: float = 1e-6, full: bool = False
    ) -> None:
        super().__init__(outputs, targets, reduction)
        self._variance = self._spread("var", var).clamp(min=eps)
        self._constant = 0.5 * math.log(2.0 * math.pi) if full else 0.0

    def value(self) -> Tensor:
        residual = self.outputs - self.targets
        return 0.5 * (self._variance.log() + residual.square() / self._variance) + self._constant

    def first(self) -> Tensor:
        return (self.outputs - self.targets) / self._variance

    def second(self) -> Tensor:
        return 1.0 / self._variance


GAUSSIAN_NLL = LossKind(
    GaussianNLL,
    "negative log-likelihood of a Normal around the outputs, with given variance; targets of the same shape [N, …]",
    {
        "var": {**NUMBERS, "default": 1.0, "description": "the variance; broadcasts to the outputs"},
        "eps": {
            "type": "number",
            "exclusiveMinimum": 0,
            "default": 1e-6,
            "description": "smaller variances are raised to this",
        },
        "full": {"type": "boolean", "default": False, "description": "include the constant term"},
    },
)
