"""What losses over classes share: the class axis, class weights, class indices that may be ignored."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.losses.base import BoundLoss, invalid_targets
from curvature_engine.precision import dtype_name
from curvature_engine.speculation import answer


class ClassLoss(BoundLoss):
    """Outputs with one score per class along their second axis, or their last: [N, C, T] inside.

    Attributes:
        scores: the outputs, [N, C, T].
        label_weights: w_y of each term, 0 where it is ignored, [N, T]; where targets are class indices.
    """

    expectation: ClassVar[str]

    def __init__(
        self, outputs: Tensor, targets: Tensor, class_axis: str | None, weight: Sequence[float] | None
    ) -> None:
        super().__init__(outputs)
        if outputs.dim() < 2:
            raise EngineError(
                "unsupported_outputs",
                f"{self.name} needs outputs [N, C, …] with at least two axes; the model returned {list(outputs.shape)}",
                param="model",
                remedy="return one score per class, or use bce_with_logits for a single logit",
            )
        self._axis = find_class_axis(self.name, outputs, targets, class_axis)
        moved = self.outputs if self._axis == 1 else self.outputs.movedim(self._axis, 1)
        self._moved_shape = moved.shape
        self.scores = moved.reshape(moved.shape[0], moved.shape[1], -1)
        self._weight = weight
        if weight is not None:
            _check_weight(self.name, weight, self.C)
        self._has_terms = True
        self._alike = False
        """Whether every term counts, and all alike."""

    @property
    def C(self) -> int:
        """The number of classes."""
        return self.scores.shape[1]

    @property
    def T(self) -> int:
        """The number of positions."""
        return self.scores.shape[2]

    def _shaped(self, column: Tensor) -> Tensor:
        """[N, C, T] in the outputs' own shape."""
        column = column.reshape(self._moved_shape)
        return column if self._axis == 1 else column.movedim(1, self._axis)

    @cached_property
    def weights(self) -> Tensor:
        """One per class, [C]."""
        if self._weight is None:
            return self.outputs.new_ones(self.C)
        return torch.tensor(self._weight, dtype=torch.float64, device=self.outputs.device).to(self.outputs.dtype)

    def _read_indices(self, targets: Tensor, ignore_index: int) -> None:
        """Set `labels` [N, T], `counts` [N, T] (0 where ignored) and `label_weights` w_y [N, T] (0 where ignored).

        And `total_weight`, the sum of these. What the host must know of the targets it reads at once.
        """
        targets = self._shaped_indices(targets)
        labels = targets.reshape(self.N, -1)
        self.labels = labels.clamp(0, self.C - 1)
        if self._weight is None and not 0 <= ignore_index < self.C and answer((self.labels == labels).all()):
            self._alike = True
            self.counts = self.label_weights = self.outputs.new_ones(labels.shape)
            self.total_weight = float(labels.numel())
            self._has_terms = labels.numel() > 0
            return
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= self.C))
        self.counts = (labels != ignore_index).to(self.outputs.dtype)
        self.label_weights = self.weights[self.labels] * self.counts
        # Weights are finite and not negative: where the sum is zero, none counts.
        self.total_weight = float(torch.where(wrong.any(), math.nan, self.label_weights.double().sum()))
        if math.isnan(self.total_weight) and len(beyond := labels[wrong]):
            raise invalid_targets(
                f"class indices must lie in 0 … {self.C - 1} for outputs {list(self.outputs.shape)}; got "
                f"{int(beyond[0])}",
                "check the number of classes of the model and of the data",
            )
        self._has_terms = self.total_weight != 0

    @property
    def has_terms(self) -> bool:
        return self._has_terms

    def _shaped_indices(self, targets: Tensor) -> Tensor:
        shape = list(self.outputs.shape)
        expected = [n for axis, n in enumerate(shape) if axis != self._axis]
        if not holds_indices(targets):
            raise invalid_targets(
                f"targets have dtype {dtype_name(targets.dtype)} and shape {list(targets.shape)}; "
                f"{self.expectation.format(indices=expected, outputs=shape)}",
                "cast or reshape them",
            )
        targets = targets.long()  # unsigned types compare with nothing negative
        if list(targets.shape) != expected:
            raise invalid_targets(
                f"{self.name} on outputs {shape} expects targets {expected}; got {list(targets.shape)}",
                "classes stand along the outputs' second axis unless class_axis says otherwise; targets hold one class "
                "index per position",
            )
        return targets


def _check_weight(name: str, weight: Sequence[float], C: int) -> None:
    if len(weight) != C:
        raise EngineError(
            "invalid_option",
            f"{name}'s weight must hold one number for each of the {C} classes; got {len(weight)}",
            param="loss.weight",
            remedy="give as many weights as the model has classes",
        )


def along_classes(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """`function(x, axis)` of x [N, C, T] along its classes, which stay next to each other where they lie so.

    torch's functions along an axis give it in the axes' own order: where classes come last in memory, what is made of
    the result would go back and forth between both.
    """
    if x.stride(1) == 1:
        return function(x.transpose(1, 2), 2).transpose(1, 2)
    return function(x, 1)


def holds_indices(targets: Tensor) -> bool:
    """Whether the targets are whole numbers."""
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def find_class_axis(name: str, outputs: Tensor, targets: Tensor, asked: str | None) -> int:
    """The outputs' axis of classes: the second, as in torch, unless `asked` for the last.

    Raises:
        EngineError: `invalid_option` where nobody said, and the targets fit the last axis.
    """
    last = outputs.dim() - 1
    if asked is not None or last == 1:
        return last if asked == "last" else 1
    shape = list(outputs.shape)
    if holds_indices(targets):
        fits_second = list(targets.shape) == shape[:1] + shape[2:]
        fits_last = list(targets.shape) == shape[:-1]
    else:
        fits_second = fits_last = targets.shape == outputs.shape
    if not fits_last:
        return 1
    found = "may stand along either axis" if fits_second else "stand along the last axis"
    raise EngineError(
        "invalid_option",
        f"targets {list(targets.shape)} on outputs {shape} say that classes {found}; {name} takes no guess",
        param="loss.class_axis",
        remedy='say class_axis="last" ([N, …, C], language models) or class_axis="second" ([N, C, …], as torch has it)',
    )


WEIGHT: dict[str, Any] = {
    "type": ["array", "null"],
    "items": {"type": "number", "minimum": 0},
    "default": None,
    "description": "one factor per class",
}
IGNORE_INDEX: dict[str, Any] = {"type": "integer", "default": -100, "description": "targets that count for nothing"}
CLASS_AXIS: dict[str, Any] = {
    "enum": ["second", "last", None],
    "default": None,
    "description": "where classes stand: second ([N, C, …], the default), or last ([N, …, C]); "
    "must be said where the targets fit the last",
}
