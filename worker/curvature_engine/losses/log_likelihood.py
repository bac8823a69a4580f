"""Negative log-likelihood of log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_engine.losses.base import LossKind, unsupported_loss
from curvature_engine.losses.classes import CLASS_AXIS, IGNORE_INDEX, WEIGHT, ClassLoss


class LogLikelihood(ClassLoss):
    """ℓ̃ = −w_y f_y: first-order quantities only; under mean Z = Σ w_y over terms that are not ignored.

    It is linear in f, so that its Hessian is zero. Cross-entropy on log-probabilities has the same value and gradient,
    and the GGN of the logits: softmax and log-softmax leave normalised log-probabilities what they are.
    """

    name = "nll"
    expectation = "nll expects class indices (int64) {indices}"
    no_second_order = (
        "it is linear in the outputs, so its Hessian in them is zero",
        "use cross_entropy: on log-probabilities it has the same value and gradient, and the GGN of the logits",
    )

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        reduction: str,
        *,
        weight: Sequence[float] | None = None,
        ignore_index: int = -100,
        class_axis: str | None = None,
    ) -> None:
        super().__init__(outputs, targets, class_axis, weight)
        self._read_indices(targets, ignore_index)
        self.Z = self.total_weight if reduction == "mean" else 1.0
        self.columns = 0

    def contributions(self) -> Tensor:
        terms = -self.label_weights * self.scores.gather(1, self.labels[:, None]).squeeze(1)
        return torch.where(self.counts > 0, terms, 0.0).sum(1) / self.Z

    def gradient(self) -> Tensor:
        zeros = torch.zeros_like(self.scores)
        return self._shaped(zeros.scatter_add(1, self.labels[:, None], -self.label_weights[:, None]) / self.Z)

    def exact_column(self, v: int) -> Tensor:
        raise unsupported_loss(f"{self.name} has no columns", self.no_second_order[1])

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        raise unsupported_loss(f"{self.name} has no columns", self.no_second_order[1])


NLL = LossKind(
    LogLikelihood,
    "negative log-likelihood of log-probabilities [N, C, …] and class indices [N, …]; first-order quantities only",
    {"weight": WEIGHT, "ignore_index": IGNORE_INDEX, "class_axis": CLASS_AXIS},
)
