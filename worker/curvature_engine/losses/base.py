"""What a loss is: its declaration, and the bound loss that gives value, gradient and square root of the Hessian."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

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
        warnings: what the caller should hear beside the result.
        first_sample: the number of the first sample in the whole data set, if the batch is a part of one.
        Z_under_mean: of a part of a data set, what its terms would be divided by under mean; it adds up over parts.
    """

    Z: float
    columns: int
    name: ClassVar[str]
    no_second_order: ClassVar[tuple[str, str] | None] = None
    """(reason, remedy) of a loss whose Hessian in the outputs is of no use."""
    first_sample: int = 0
    Z_under_mean: float | None = None

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs.detach().to(accumulation_dtype(outputs.dtype))
        self.warnings: list[str] = []

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

    @property
    def rank(self) -> int:
        """How many root columns there are: 1 … V."""
        return self.columns

    def root_column(self, v: int) -> Tensor:
        """Column v of a square root of each H_n with as few columns as are known to do, whatever root that is."""
        return self.exact_column(v)

    def exact_columns(self, first: int, stop: int) -> Tensor:
        """Columns `first` … `stop` of `exact_column`, [k, N, …]."""
        return torch.stack([self.exact_column(v) for v in range(first, stop)])

    def root_columns(self, first: int, stop: int) -> Tensor:
        """Columns `first` … `stop` of `root_column`, [k, N, …]."""
        return torch.stack([self.root_column(v) for v in range(first, stop)])

    def summed_hessian(self) -> Tensor:
        """Σ_n H_n, [D, D] over the elements of one sample's outputs."""
        D = self.outputs[0].numel()
        total = torch.zeros(D, D, dtype=self.outputs.dtype, device=self.outputs.device)
        for v in range(self.rank):
            column = self.root_column(v).reshape(self.N, D)
            (alive,) = column.any(0).nonzero(as_tuple=True)  # most columns are of one position only
            part = column[:, alive]
            total[alive[:, None], alive] += part.T @ part
        return total

    @abstractmethod
    def sampled_column(self, seed: int, draw: int) -> Tensor:
        """A random column with E s sᵀ = H_n (with 1/√Z, without 1/√M), [N, …] like the outputs."""

    def sampled_columns(self, seed: int, first: int, stop: int) -> Tensor:
        """Columns `first` … `stop` of `sampled_column`, [k, N, …]."""
        return torch.stack([self.sampled_column(seed, draw) for draw in range(first, stop)])

    def check_second_order(self, asked: Sequence[str]) -> None:
        """Refuse quantities that need columns where there are none.

        Raises:
            EngineError: `unsupported_loss`, naming the extensions `asked` for.
        """
        if self.no_second_order is not None:
            reason, remedy = self.no_second_order
            raise unsupported_loss(f"{self.name} gives no {', '.join(asked)}: {reason}", remedy)

    @property
    def has_terms(self) -> bool:
        """Whether any term counts."""
        return True

    def _samples(self) -> Tensor:
        """The samples' numbers, by which draws are made, [N]."""
        return self.first_sample + torch.arange(self.N, device=self.outputs.device)


OUTPUT: Options = {
    "output": {
        "type": ["integer", "string", "null"],
        "default": None,
        "description": "which entry of a tuple (index) or dictionary (key) that the model returns",
    }
}
"""What every loss takes."""


@dataclass(frozen=True)
class LossKind:
    """An entry of the registry of losses.

    Attributes:
        bind: called with outputs, targets, reduction, and the options by name, `output` excepted.
        options: its own, and those that every loss takes.
    """

    bind: Callable[..., BoundLoss]
    summary: str
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {**self.options, **OUTPUT})


def invalid_targets(message: str, remedy: str) -> EngineError:
    """The targets do not fit the loss or the outputs."""
    return EngineError("invalid_targets", message, param="targets", remedy=remedy)


def without_terms() -> EngineError:
    """Nothing is left to take a sum or a mean of."""
    return invalid_targets(
        "every target is ignore_index, or of a class with weight 0: no term is left",
        "leave at least one target that counts",
    )


def unsupported_loss(message: str, remedy: str) -> EngineError:
    """The loss cannot give what was asked for."""
    return EngineError("unsupported_loss", message, param="loss", remedy=remedy)
