"""What can be said of a model before it runs: its form, and what each parameter is expected to get.

Operators decide which rule applies, and that is read off the program; whether a rule fits a call, and whether samples
are coupled, only a run can say. So methods are expected ones: a run may fall back where a closed form was expected.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from curvature_engine.extensions import EXTENSIONS, Extension, ForeseenUse
from curvature_engine.formats import Use
from curvature_engine.openings import OPENINGS
from curvature_engine.parameters import Parameter
from curvature_engine.plugins import load_plugins
from curvature_engine.precision import dtype_name
from curvature_engine.program import Program, load
from curvature_engine.rules import RULES
from curvature_engine.selection import COMPLEX
from curvature_engine.tables import table
from curvature_engine.version import __version__

_BY_ELEMENTS = "where one use of it feeds another, Hessian diagonals go element by element"


@dataclass(frozen=True)
class InspectedInput:
    """One input of the model."""

    name: str
    required: bool


@dataclass(frozen=True)
class InspectedOperator:
    """A tensor operator: how often it stands in the program, all branches counted."""

    name: str
    count: int


@dataclass(frozen=True)
class UnsupportedOperator:
    """An operator that no run could pass, and where it stands."""

    name: str
    place: str


@dataclass(frozen=True)
class InspectedUse:
    """An operator that consumes a parameter, and where it stands."""

    operator: str
    place: str


@dataclass(frozen=True)
class InspectedParameter:
    """A parameter, and what it is expected to get.

    Attributes:
        aliases: its further names, where it is shared.
        uses: the operators that consume it.
        closed_form: extensions by rules, or ordinary autograd.
        fallback: extensions by one backward pass per sample.
        none: extension → why it gives nothing for this parameter.
        note: what else decides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    aliases: tuple[str, ...]
    uses: tuple[InspectedUse, ...]
    closed_form: tuple[str, ...]
    fallback: tuple[str, ...]
    none: dict[str, str]
    note: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What a model is.

    Attributes:
        format: of its file.
        training: whether it was saved in training mode (analyses put it into eval mode unless told otherwise).
        fixed_samples: the only number of samples that the file says it takes; None where it says nothing.
        buffers: names of the tensors that are no parameters.
        notes: what of the model the file may have lost.
        unsupported: operators that no run could pass; a run on another branch may.
    """

    engine_version: str
    format: str
    training: bool
    fixed_samples: int | None
    inputs: tuple[InspectedInput, ...]
    parameters: tuple[InspectedParameter, ...]
    buffers: tuple[str, ...]
    operators: tuple[InspectedOperator, ...]
    unsupported: tuple[UnsupportedOperator, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        inputs = ", ".join(i.name if i.required else f"[{i.name}]" for i in self.inputs)
        elements = sum(torch.Size(p.shape).numel() for p in self.parameters)
        mode = ", saved in training mode" if self.training else ""
        lines = [
            f"{self.format}{mode}; inputs: {inputs}",
            f"{len(self.parameters)} parameters, {elements:,} elements; {len(self.buffers)} buffers",
            f"operators: {', '.join(f'{o.name} ×{o.count}' for o in self.operators)}",
            *(f"not supported: {o.name} ({o.place})" for o in self.unsupported),
            *(f"note: {note}" for note in self.notes),
            "",
        ]
        head = ("parameter", "shape", "dtype", "consumed by", "closed form", "fallback", "none")
        rows = [head, *map(_row, self.parameters)]
        return "\n".join([*lines, *table(rows)])


def inspect(model: Any, *, device: str | torch.device = "cpu", eval: bool = True) -> Inspection:
    """What a model is, without running it; the model as for `analyze`.

    Raises:
        EngineError: `invalid_model`, `no_parameters`, `unsupported_model`.
    """
    load_plugins()
    return inspect_program(load(model, device=device, eval=eval))


def inspect_program(program: Program) -> Inspection:
    """`inspect` of a loaded program."""
    front = program.front
    consumers = front.consumers()
    return Inspection(
        engine_version=__version__,
        format=program.format,
        training=program.was_training,
        fixed_samples=front.fixed_samples,
        inputs=tuple(InspectedInput(each.name, each.required) for each in front.inputs()),
        parameters=tuple(_parameter(p, consumers.get(name, [])) for name, p in program.parameters.items()),
        buffers=tuple(program.buffers),
        operators=tuple(InspectedOperator(name, count) for name, count in sorted(front.operators().items())),
        unsupported=tuple(UnsupportedOperator(use.operator, use.place) for use in front.refused()),
        notes=tuple(front.notes),
    )


def _parameter(parameter: Parameter, uses: Sequence[Use]) -> InspectedParameter:
    foreseen = [_foresee(use) for use in uses]
    closed = all(use.closed for use in foreseen)
    closed_form, fallback, none = [], [], {}
    for extension in EXTENSIONS.values():
        if extension.columns == "outputs":
            continue
        reason = COMPLEX if parameter.tensor.is_complex() else _obstacle(extension, foreseen)
        if reason is not None:
            none[extension.name] = reason
        elif closed or extension.accumulator is None:
            closed_form.append(extension.name)
        else:
            fallback.append(extension.name)
    return InspectedParameter(
        parameter.name,
        tuple(parameter.tensor.shape),
        dtype_name(parameter.tensor.dtype),
        parameter.trainable,
        tuple(parameter.aliases),
        tuple(InspectedUse(use.operator, use.place) for use in uses),
        tuple(closed_form),
        tuple(fallback),
        none,
        _note(uses, closed),
    )


def _obstacle(extension: Extension, uses: Sequence[ForeseenUse]) -> str | None:
    return None if extension.accumulator is None else extension.accumulator.foresee(uses)


def _foresee(use: Use) -> ForeseenUse:
    """What the operator's rules say; what is opened, or made of parameters alone, has those of others."""
    name = use.operator.removesuffix("_")
    if use.alone or name in OPENINGS:
        return ForeseenUse(name, closed=True, factors=True)
    matchers = RULES.get(name, ())
    rules = [rule for matcher in matchers if (rule := getattr(matcher, "rule", None)) is not None]
    factors = len(rules) < len(matchers) or any(rule.offers_factors(name) for rule in rules)
    return ForeseenUse(name, closed=bool(matchers), factors=bool(matchers) and factors)


def _note(uses: Sequence[Use], closed: bool) -> str | None:
    if not uses:
        return "no operator consumes it: its results are zero"
    opened = sorted({use.operator for use in uses if use.operator in OPENINGS})
    if opened:
        return f"{', '.join(opened)} opens into elementary operators when it runs"
    if any(use.alone for use in uses):
        return "what is made of it without the batch goes on into other operators, which decide"
    return _BY_ELEMENTS if closed and len(uses) > 1 else None


def _row(parameter: InspectedParameter) -> tuple[str, ...]:
    name = parameter.name if parameter.trainable else f"{parameter.name} (frozen)"
    return (
        " = ".join([name, *parameter.aliases]),
        "×".join(map(str, parameter.shape)),
        parameter.dtype,
        ", ".join(dict.fromkeys(use.operator for use in parameter.uses)),
        _count(parameter.closed_form),
        _count(parameter.fallback),
        _count(tuple(parameter.none), most=4),
    )


def _count(names: Sequence[str], most: int = 2) -> str:
    return ", ".join(names) if len(names) <= most else f"{len(names)} extensions"
