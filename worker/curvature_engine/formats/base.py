"""What a front end is: one model format's way from a file or an object to a program that can be run.

A new format is one file here and one line in `__init__.py`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from curvature_engine.digests import Digest
from curvature_engine.errors import EngineError
from curvature_engine.execution import Run
from curvature_engine.parameters import Parameter

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class Use(NamedTuple):
    """One operator that consumes a parameter, found without running the program.

    `alone`: nothing of the batch enters it, so what it makes is the same for every sample.
    """

    operator: str
    place: str
    alone: bool = False


class FrontEnd(ABC):
    """A model in one format, on one device.

    Attributes:
        format: the format's name.
        save_with: how to write such a file, for messages.
        parameters: name → parameter, as in `named_parameters()`; shared ones once.
        aliases: a shared parameter's further names → its first.
        buffers: names of the tensors that are none.
        was_training: whether the model was saved in training mode.
        edits_tensors: whether some operator edits tensors: then each run works on copies.
        notes: what of the model the file may have lost, for the user to know.
        asks_layout: whether the program asks how tensors lie in memory.
        fixed_samples: the only number of samples that the file says it takes; None where it says nothing.
    """

    format: ClassVar[str]
    save_with: ClassVar[str]
    parameters: dict[str, Parameter]
    aliases: dict[str, str]
    buffers: tuple[str, ...]
    was_training: bool
    edits_tensors: bool
    asks_layout: bool = False
    notes: tuple[str, ...] = ()
    fixed_samples: int | None = None
    _formal: "list[Formal]"

    def inputs(self) -> "tuple[Formal, ...]":
        """What forward takes."""
        return tuple(self._formal)

    @classmethod
    @abstractmethod
    def holds(cls, entries: Collection[str]) -> bool:
        """Whether an archive with these entries is a file of this format."""

    @classmethod
    @abstractmethod
    def accepts(cls, model: Any) -> bool:
        """Whether an object is a model of this format, or can be made one."""

    @classmethod
    @abstractmethod
    def from_file(cls, path: Path, device: torch.device, *, eval: bool) -> Self:
        """Load a file.

        Raises:
            EngineError: `invalid_model`, `no_parameters`, `unsupported_model`.
        """

    @classmethod
    @abstractmethod
    def from_object(cls, model: Any, device: torch.device, *, eval: bool) -> Self:
        """Take a copy of an object: the caller's stays as it is.

        Raises:
            EngineError: `no_parameters`, `unsupported_model`.
        """

    @abstractmethod
    def bind(self, inputs: Inputs) -> list[Any]:
        """Line a batch's inputs, given by place or by name, up with what the program takes.

        Raises:
            EngineError: `invalid_inputs`.
        """

    @abstractmethod
    def run(self, run: Run, arguments: Sequence[Any]) -> Any:
        """Execute on bound inputs; returns what the model returns."""

    @abstractmethod
    def describe(self, digest: Digest) -> None:
        """Tell a digest all of the program that decides results, parameters excepted."""

    @abstractmethod
    def operators(self) -> Counter[str]:
        """How often each tensor operator (without namespace) stands in the program, all branches counted."""

    def refused(self) -> list[Use]:
        """Operators that stand in the program and that no run could pass."""
        return []

    @abstractmethod
    def consumers(self) -> dict[str, list[Use]]:
        """Parameter → the operators that consume it, found by following attributes, lists and movers."""


class Formal(NamedTuple):
    """One input that a program takes."""

    name: str
    required: bool = True
    default: Any = None


def bind_inputs(inputs: Inputs, formal: Sequence[Formal]) -> list[Any]:
    """One value per formal input.

    Raises:
        EngineError: `invalid_inputs` where names are unknown, values too many, or required ones missing.
    """
    names = [each.name for each in formal]
    if isinstance(inputs, Mapping):
        unknown = [name for name in inputs if name not in names]
        if unknown:
            raise EngineError(
                "invalid_inputs",
                f"forward has no input named {unknown[0]!r}",
                param=f"inputs.{unknown[0]}",
                remedy=f"its inputs are: {', '.join(names)}",
            )
        given = dict(inputs)
    else:
        values = inputs if isinstance(inputs, tuple | list) else (inputs,)
        if len(values) > len(formal):
            raise EngineError(
                "invalid_inputs",
                f"forward takes {len(formal)} inputs ({', '.join(names)}); got {len(values)}",
                param="inputs",
                remedy="give as many inputs as forward takes",
            )
        given = dict(zip(names, values, strict=False))
    missing = [each.name for each in formal if each.required and each.name not in given]
    if missing:
        raise EngineError(
            "invalid_inputs",
            f"forward's input {missing[0]!r} is missing ({len(given)} given, it takes {len(formal)}: "
            f"{', '.join(names)})",
            param=f"inputs.{missing[0]}",
            remedy="give it too, by place or by name",
        )
    return [given.get(each.name, each.default) for each in formal]


def without_parameters() -> EngineError:
    """The refusal of a model that has none."""
    return EngineError(
        "no_parameters",
        "the model has no parameters: a frozen or optimised file keeps them as constants",
        param="model",
        remedy="save the module before torch.jit.freeze or optimize_for_inference",
    )
