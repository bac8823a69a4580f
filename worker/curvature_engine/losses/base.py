"""What a loss is: its declaration, and the bound loss that gives value, gradient and square root of the Hessian."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.options import Options
from curvature_engine.precision import accumulation_dtype


class BoundLoss(ABC):
    """A loss on one batch of outputs f [N, …] and targets: L = (1/Z) Σ ℓ̃ over terms.

    Attributes:
        Z: what the sum of the terms is divided by.
        columns: V, the number of exact columns.
    """

    Z: float
    columns: int

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs.detach().to(accumulation_dtype(outputs.dtype))

    @property
    def N(self) -> int:
        """The number of samples."""
        return self.outputs.shape[0]

    @abstractmethod
    def contributions(self) -> Tensor:
        """Each sample's terms divided by Z: [N]; they sum to L."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """∂L/∂f, [N, …] like the outputs."""

    @abstractmethod
    def exact_column(self, v: int) -> Tensor:
        """Column v of the square root of each H_n (with 1/√Z), [N, …] like the outputs."""

    @abstractmethod
    def sampled_column(self, seed: int, draw: int) -> Tensor:
        """A random column with E s sᵀ = H_n (with 1/√Z, without 1/√M), [N, …] like the outputs."""

    def _samples(self) -> Tensor:
        return torch.arange(self.N, device=self.outputs.device)


@dataclass(frozen=True)
class LossKind:
    """An entry of the registry of losses."""

    bind: Callable[..., BoundLoss]
    summary: str
    options: Options = field(default_factory=dict)


def invalid_targets(message: str, remedy: str) -> EngineError:
    """The targets do not fit the loss or the outputs."""
    return EngineError("invalid_targets", message, param="targets", remedy=remedy)
