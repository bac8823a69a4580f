"""Losses that are a sum over components, each a function of one output and one target."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature_engine import draws
from curvature_engine.errors import EngineError
from curvature_engine.losses.base import BoundLoss, invalid_targets
from curvature_engine.precision import dtype_name


class Elementwise(BoundLoss):
    """f and targets of one shape [N, …] with D components a sample; under mean divided by N·D.

    A subclass gives the unreduced ℓ̃ of a component and its derivatives in f, each [N, …] like the outputs.

    Columns: √ℓ̃″ on the diagonal. Sampled: √ℓ̃″ times standard normal numbers, so that E s sᵀ = H_n; where the loss is
    a Gaussian likelihood's, this is its gradient at targets drawn from it. Losses with another likelihood may draw
    from that instead.
    """

    takes_bool = False

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str) -> None:
        super().__init__(outputs)
        self._check(targets)
        self.targets = targets.to(self.outputs.dtype)
        self.columns = self.outputs[0].numel()
        self.Z = float(self.outputs.numel()) if reduction == "mean" else 1.0

    @abstractmethod
    def value(self) -> Tensor:
        """ℓ̃ of each component."""

    @abstractmethod
    def first(self) -> Tensor:
        """∂ℓ̃/∂f of each component."""

    @abstractmethod
    def second(self) -> Tensor:
        """∂²ℓ̃/∂f² of each component, not negative."""

    def contributions(self) -> Tensor:
        return self.value().reshape(self.N, -1).sum(1) / self.Z

    def gradient(self) -> Tensor:
        return self.first() / self.Z

    def exact_column(self, v: int) -> Tensor:
        column = torch.zeros_like(self._root)
        column[:, v] = self._root[:, v]
        return column.reshape(self.outputs.shape)

    def summed_hessian(self) -> Tensor:
        return torch.diag(self._root.square().sum(0))

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        z = draws.normal(seed, self._samples(), self._positions(), draw).to(self.outputs.dtype)
        return (self._root * z).reshape(self.outputs.shape)

    @cached_property
    def _root(self) -> Tensor:
        """√(ℓ̃″/Z), [N, D]."""
        return (self.second() / self.Z).sqrt().reshape(self.N, -1)

    def _positions(self) -> Tensor:
        return torch.arange(self.columns, device=self.outputs.device)

    def _check(self, targets: Tensor) -> None:
        if targets.shape != self.outputs.shape:
            raise invalid_targets(
                f"{self.name} expects targets of the outputs' shape {list(self.outputs.shape)}; "
                f"got {list(targets.shape)}",
                "reshape the targets",
            )
        if targets.is_complex() or (targets.dtype == torch.bool and not self.takes_bool):
            raise invalid_targets(
                f"{self.name} expects real targets; got {dtype_name(targets.dtype)}",
                "cast them to a floating-point type",
            )

    def _spread(self, option: str, value: Any) -> Tensor:
        """Numbers given as an option, nested lists for several axes, broadcast to the outputs' shape as torch does.

        Raises:
            EngineError: `invalid_option`.
        """
        shape = self.outputs.shape
        try:
            numbers = torch.tensor(value, dtype=torch.float64, device=self.outputs.device)
            spread = numbers.broadcast_to(shape)
        except (ValueError, TypeError, RuntimeError) as error:
            raise self._misfit(option, "numbers that broadcast to one sample's or the whole batch's outputs") from error
        if not bool((numbers >= 0).all()) or not bool(torch.isfinite(numbers).all()):
            raise self._misfit(option, "numbers from 0")
        return spread.to(self.outputs.dtype)

    def _misfit(self, option: str, expected: str) -> EngineError:
        return EngineError(
            "invalid_option",
            f"{self.name}'s {option} must be {expected}; the outputs have shape {list(self.outputs.shape)}",
            param=f"loss.{option}",
            remedy="give one number, or a list with one number per entry of the outputs' last axis",
        )


NUMBERS: dict[str, Any] = {
    "type": ["number", "array"],
    "items": {"type": ["number", "array"], "items": {}},
    "minimum": 0,
}
"""Schema of numbers that broadcast: what nested lists hold is checked when they meet the outputs."""
