"""Binary cross-entropy on logits."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curvature_engine import draws
from curvature_engine.losses.base import LossKind, invalid_targets
from curvature_engine.losses.elementwise import NUMBERS, Elementwise
from curvature_engine.speculation import answer


class BinaryCrossEntropy(Elementwise):
    """ℓ̃ = −w (π t log σ(f) + (1 − t) log σ(−f)), targets t in [0, 1], weights w, weight π of positive targets.

    Columns: √(w (1 + (π − 1) t) σ(1−σ)) on the diagonal. Sampled: (σ − b) √(w (1 + (π − 1) t)), b Bernoulli(σ).
    """

    name = "bce_with_logits"
    takes_bool = True

    def __init__(
        self, outputs: Tensor, targets: Tensor, reduction: str, *, weight: Any = None, pos_weight: Any = None
    ) -> None:
        super().__init__(outputs, targets, reduction)
        if answer(((self.targets < 0) | (self.targets > 1)).any()):
            raise invalid_targets(
                f"{self.name} expects targets in [0, 1]; got some in "
                f"[{float(self.targets.min()):.6g}, {float(self.targets.max()):.6g}]",
                "give the probability of the positive class for each output",
            )
        positive = self._spread("pos_weight", 1.0 if pos_weight is None else pos_weight)
        weights = self._spread("weight", 1.0 if weight is None else weight)
        self._of_positive = weights * positive * self.targets
        self._of_negative = weights * (1.0 - self.targets)

    def value(self) -> Tensor:
        return -self._of_positive * F.logsigmoid(self.outputs) - self._of_negative * F.logsigmoid(-self.outputs)

    def first(self) -> Tensor:
        return self._of_negative * self.outputs.sigmoid() - self._of_positive * (-self.outputs).sigmoid()

    def second(self) -> Tensor:
        return (self._of_positive + self._of_negative) * self.outputs.sigmoid() * (-self.outputs).sigmoid()

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        u = draws.uniform(seed, self._samples(), self._positions(), draw).reshape(self.outputs.shape)
        p = self.outputs.double().sigmoid()
        score = (p - (u < p).double()).to(self.outputs.dtype)
        column: Tensor = score * ((self._of_positive + self._of_negative) / self.Z).sqrt()
        return column


_WEIGHTS: dict[str, Any] = {**NUMBERS, "type": ["number", "array", "null"], "default": None}

BCE_WITH_LOGITS = LossKind(
    BinaryCrossEntropy,
    "binary cross-entropy of logits and targets in [0, 1], of one shape [N, …]",
    {
        "weight": {**_WEIGHTS, "description": "factor of each output's loss; broadcasts to the outputs"},
        "pos_weight": {**_WEIGHTS, "description": "factor of the positive class; broadcasts to the outputs"},
    },
)
