"""What an extension is: its declaration, and the accumulator that makes its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from curvature_engine.contributions import Contribution, PreparedUse
from curvature_engine.options import Options

Columns = Literal["outputs", "gradient", "exact", "sampled"]
Kind = Literal["tensor", "parameters", "factors"]
Residual = Literal["sum", "per sample"]

WHOLE = "*"
"""Key of a result over all parameters together; no parameter can have it as its name."""


class KroneckerFactors(NamedTuple):
    """A parameter's curvature block as B ⊗ A (A is None for biases: the block is B)."""

    B: Tensor
    A: Tensor | None


@dataclass(frozen=True)
class Setting:
    """What an accumulator knows beforehand.

    Attributes:
        N: the number of samples that contributions will hold: of the batch, or of the request's subsample.
        Z: what the loss divided by.
        columns: how many columns will come.
        draws: M for sampled columns, over which results are averaged; else 1.
        budget_bytes: memory for intermediates.
        parameters: those asked for, by name.
        uses: of parameters with closed forms, by name; known once columns come.
        options: the request's, complete.
    """

    N: int
    Z: float
    columns: int
    draws: int
    budget_bytes: int
    parameters: Mapping[str, Tensor]
    uses: Mapping[str, Sequence[PreparedUse]]
    options: Mapping[str, Any]


class Accumulator(ABC):
    """Takes one parameter's contribution per column, and gives the result at the end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.missing: dict[str, str] = {}

    @abstractmethod
    def add(self, parameter: str, contribution: Contribution) -> None:
        """Take one column's contribution of one parameter."""

    def add_residual(self, parameter: str, first: int, block: Tensor) -> None:
        """Take what the model's second derivatives add for samples `first` … `first + n`, [n, *p]."""
        raise NotImplementedError

    @abstractmethod
    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        """The result by parameter; of kind "tensor", one under `WHOLE`."""


@dataclass(frozen=True)
class Extension:
    """An entry of the registry.

    Attributes:
        columns: what is propagated back: nothing ("outputs"), the loss's gradient, or columns of the square root of
            the loss's Hessian.
        accumulator: makes the result; None for quantities of the outputs and for `grad`.
        residual: whether the model's second derivatives enter, too: their sum over samples, or every sample's.
        adapt: options → the fields that they change (kind, shape, columns); the fields above are those by default.
    """

    name: str
    summary: str
    kind: Kind
    shape: str
    formula: str
    source: str
    columns: Columns
    accumulator: type[Accumulator] | None = None
    options: Options = field(default_factory=dict)
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    residual: Residual | None = None

    def under(self, options: Mapping[str, Any]) -> "Extension":
        """The extension as complete options make it."""
        return self if self.adapt is None else replace(self, **self.adapt(options))
