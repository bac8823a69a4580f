"""What an extension is: its declaration, and the accumulator that makes its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from curvature_engine.averaged import Averaged
from curvature_engine.contributions import Contribution
from curvature_engine.extensions.mergers import Merger
from curvature_engine.options import Options
from curvature_engine.precision import accumulation_dtype
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.stacked import Stacked
from curvature_engine.stores import ResultStore, Slab

Columns = Literal["outputs", "gradient", "exact", "sampled", "averaged"]
Kind = Literal["tensor", "parameters", "factors"]
Residual = Literal["sum", "per sample"]
Merging = Literal["sum", "append", "welford", "whole batch"]
"""How results of parts of a batch, or of a data set, become that of all: sums add up; rows are put in their samples'
places; centred second moments merge by Chan, Golub & LeVeque 1983; or they do not, and need all samples in one part."""

WHOLE = "*"
"""Key of a result over all parameters together; no parameter can have it as its name."""


class KroneckerFactors(NamedTuple):
    """A parameter's curvature block as B ⊗ A (A is None for biases: the block is B)."""

    B: Tensor
    A: Tensor | None


class Judged(Protocol):
    """What is known of a batch's gradients before they are made."""

    @property
    def methods(self) -> Mapping[str, str]:
        """Parameter → "closed form" or "fallback"."""

    @property
    def verified(self) -> bool:
        """Whether the run-time checks held."""

    @property
    def verification(self) -> str | None:
        """When they were made."""

    def contribution(self, name: str) -> Contribution:
        """A parameter's contribution with the shapes that it will have, and no numbers."""


@dataclass(frozen=True)
class Against:
    """Another batch, and its individual gradients g′_m.

    Attributes:
        N: how many samples it has.
        Z: what its loss divides by.
        gradients: parameter → g′.
        work: how they come about.
        held_bytes: what its graph, the gradients at its layers and their rearranged inputs take, until the end.
    """

    N: int
    Z: float
    gradients: Callable[[str], Contribution]
    work: Judged
    held_bytes: int


@dataclass(frozen=True)
class Setting:
    """What an accumulator knows beforehand.

    Attributes:
        label: the request's.
        N: the number of samples that contributions will hold, in all parts together: of the batch, or of the request's
            subsample.
        Z: what the loss divided by.
        columns: how many columns will come.
        draws: M for sampled columns, over which results are averaged; else 1.
        budget_bytes: memory for intermediates.
        parameters: those asked for, by name.
        uses: of parameters with closed forms, by name; known once columns come, and anew with every part.
        options: the request's, complete.
        store: where results lie that are filled row by row.
        against: the other batch, where one is asked for.
        part: whether the batch is a part of a data set, whose `state` will be merged with others'.
    """

    label: str
    N: int
    Z: float
    columns: int
    draws: int
    budget_bytes: int
    parameters: Mapping[str, Tensor]
    uses: Mapping[str, Sequence[PreparedUse]]
    options: Mapping[str, Any]
    store: ResultStore = field(default_factory=ResultStore)
    against: Against | None = None
    part: bool = False

    def slab(self, parameter: str, leading: Sequence[int]) -> Slab:
        """Room for a parameter's result [*leading, *p], zero at first."""
        like = self.parameters[parameter]
        dtype = accumulation_dtype(like.dtype)
        return self.store.slab(self.label, parameter, (*leading, *like.shape), len(leading), dtype, like.device)


@dataclass(frozen=True)
class Sketch:
    """What an accumulator will do with one parameter's contributions: for the plan.

    Attributes:
        form: "materialised", "gram", "reduced" or "factors".
        multiply_adds: of one column.
        shapes: of the result's tensors.
        missing: why there will be no result.
        intermediate_bytes: if not what writing out a block of gradients takes.
    """

    form: str
    multiply_adds: int
    shapes: tuple[tuple[int, ...], ...]
    missing: str | None = None
    intermediate_bytes: int | None = None


class ForeseenUse(NamedTuple):
    """One operator that consumes a parameter, as its rules foresee it before any run.

    Attributes:
        closed: whether a rule may apply.
        factors: whether a rule may have a Kronecker form.
    """

    operator: str
    closed: bool
    factors: bool


class Accumulator(ABC):
    """Takes one parameter's contribution per column, and gives the result at the end.

    The samples come in one part or several, each with its own forward pass: `start` announces a part, then come all of
    its columns, then `stop`.

    Attributes:
        rows: places in the result of the current part's samples.
        missing: parameter → why it has no result.
    """

    reductions: ClassVar[frozenset[str]] = frozenset()
    """Which of a contribution's reductions `add` asks for."""
    writes: ClassVar[bool] = False
    """Whether `add` writes all gradients out, so that others may reduce them on the way."""
    keeps_windows: ClassVar[bool] = False
    """Whether `add_stacked` keeps inputs unfolded whole for the columns to come."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rows: Sequence[int] = range(setting.N)
        self.missing: dict[str, str] = {}

    @classmethod
    def foresee(cls, uses: Sequence[ForeseenUse]) -> str | None:
        """Why a parameter with these uses can have no result, asked before any run; None where it may."""
        return None

    def start(self, rows: Sequence[int]) -> None:
        """Begin a part, whose contributions hold the samples with these places in the result."""
        self.rows = rows

    def stop(self) -> None:  # noqa: B027 (most have nothing to do)
        """End a part: no more of its columns come."""

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        """What `add` would do with contributions like this one, whose numbers mean nothing."""
        return Sketch("materialised", contribution.multiply_adds(), (self.result_shape(contribution.shape),))

    def obstacle(self, parameter: str, contribution: Contribution) -> str | None:
        """Why there will be no result of its own from contributions like this one; None where there will."""
        return self.sketch(parameter, contribution).missing

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result of a parameter [*p]."""
        return shape

    @abstractmethod
    def add(self, parameter: str, contribution: Contribution) -> None:
        """Take one column's contribution of one parameter."""

    def add_stacked(self, parameter: str, stacked: Stacked) -> bool:
        """Take several columns' contributions of one parameter, if that is more than to `add` one after another."""
        return False

    def add_residual(self, parameter: str, first: int, block: Tensor) -> None:
        """Take what the model's second derivatives add for the part's samples `first` … `first + n`, [n, *p]."""
        raise NotImplementedError

    def note_missing(self, parameter: str, contribution: Contribution) -> None:
        """Note why there is no result from contributions like this one, if so (`add` notes it by itself).

        Raises:
            EngineError: `unsupported_model` where the request wants a result.
        """
        raise NotImplementedError

    def add_averaged(self, parameter: str, contribution: Contribution, averaged: Averaged) -> None:
        """Take the averaged matrix in the output of a parameter's layer; the contribution has shapes, no numbers."""
        raise NotImplementedError

    @abstractmethod
    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        """The result by parameter; of kind "tensor", one under `WHOLE`."""

    def state(self) -> dict[str, Tensor | KroneckerFactors]:
        """What is left of a part of a data set, for the extension's merger: by default its result."""
        return self.finish()


@dataclass(frozen=True)
class Extension:
    """An entry of the registry.

    Attributes:
        columns: what is propagated back: nothing ("outputs"), the loss's gradient, or columns of the square root of
            the loss's Hessian; or the sum of these Hessians, averaged over the samples at every operator.
        accumulator: makes the result; None for quantities of the outputs and for `grad`.
        residual: whether the model's second derivatives enter, too: their sum over samples, or every sample's.
        merging: how results of parts merge; "whole batch" keeps every request beside it from being divided.
        streams: whether the result is filled row by row through `Setting.slab`, under the parameters' names, and
            `finish` does no more than collect: then it can go to a file as it is made.
        adapt: options → the fields that they change (kind, shape, columns, degree); the fields above are those by
            default.
        degree: the result is that of the loss's sum divided by Z to this power; of Kronecker factors B is, and A has
            no part in it. None: not declared, and then there is no result over data sets under mean.
        sample_axis: along which results that append have their samples.
        merger: joins the states of a data set's parts; where results add up, none is needed.
        any_root: whether exact columns may be those of any square root, as short as there is one: results that are
            sums over columns of squares or outer products are the same for all.
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
    merging: Merging = "whole batch"
    streams: bool = False
    degree: float | None = None
    sample_axis: int = 0
    merger: type[Merger] | None = None
    any_root: bool = False

    def under(self, options: Mapping[str, Any]) -> "Extension":
        """The extension as complete options make it."""
        return self if self.adapt is None else replace(self, **self.adapt(options))

    def draws_when(self) -> dict[str, list[Any]] | None:
        """Option → values under which the seed enters the result: {} where it always does, None where it never does.

        Options are asked that have a choice of values. Where several together decide, each is named with all values
        under which the seed may enter: one that is taken to count and does not costs nothing but a computation.
        """
        options = self.options.items()
        choices = {name: schema["enum"] for name, schema in options if "enum" in schema}
        choices |= {name: [False, True] for name, schema in options if schema.get("type") == "boolean"}
        defaults = {name: schema["default"] for name, schema in options}
        combinations = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        drawn = [chosen for chosen in combinations if self.under({**defaults, **chosen}).columns == "sampled"]
        found = {
            name: [v for v in values if any(v == each[name] for each in drawn)] for name, values in choices.items()
        }
        return {n: values for n, values in found.items() if len(values) < len(choices[n])} if drawn else None
