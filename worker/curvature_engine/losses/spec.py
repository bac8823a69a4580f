"""A loss as asked for: read, checked, and bound to a batch."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvature_engine.errors import EngineError
from curvature_engine.losses.base import BoundLoss, LossKind, invalid_targets, without_terms
from curvature_engine.losses.classes import holds_indices
from curvature_engine.losses.custom import custom_loss
from curvature_engine.losses.modules import ALIASES, read_module
from curvature_engine.losses.registry import LOSSES
from curvature_engine.options import complete_options
from curvature_engine.precision import dtype_name

CUSTOM = "custom"
"""The name of a loss given as a function. It is not in the registry: no request over the wire can name a file."""


class LossSpec:
    """A loss as asked for: name, options, reduction.

    Attributes:
        output: which entry of a tuple (index) or dictionary (key) enters the loss; None where the model returns one
            tensor.
    """

    def __init__(self, name: str | None, options: Mapping[str, Any], reduction: str, function: Any = None) -> None:
        if reduction not in ("mean", "sum"):
            raise EngineError(
                "invalid_option",
                f'reduction must be "mean" or "sum"; got {reduction!r}',
                param="reduction",
                remedy="choose one of the two",
            )
        self.name, self.reduction = None if name is None else ALIASES.get(name, name), reduction
        self.options: dict[str, Any] = {}
        self.output: int | str | None = None
        self._kind = _default_kind() if self.name is None else _find_kind(self.name, function)
        self.options = complete_options(self.name or "the default loss", self._kind.options, options, "loss")
        self.output = self.options.pop("output")
        self._by_default = self.name is None

    @classmethod
    def parse(cls, loss: Any, reduction: str | None) -> "LossSpec":
        """Read a loss given as None, a name, a mapping, one of torch's loss modules, or a TorchScript function."""
        if isinstance(loss, nn.Module) and not isinstance(loss, torch.jit.ScriptModule):
            return cls(*read_module(loss), _agreed(str(loss.reduction), reduction))
        reduction = "mean" if reduction is None else reduction
        if isinstance(loss, torch.jit.ScriptFunction | torch.jit.ScriptModule | bytes | os.PathLike):
            return cls(CUSTOM, {}, reduction, loss)
        if loss is None or isinstance(loss, str):
            return cls(loss, {}, reduction)
        if isinstance(loss, Mapping) and isinstance(loss.get("name"), str):
            return cls._from_mapping(loss, reduction)
        raise EngineError(
            "unknown_loss",
            f"a loss is a name, a mapping with a name, a loss module, or a TorchScript function; "
            f"got {type(loss).__name__}",
            param="loss",
            remedy=f"known losses: {', '.join(LOSSES)}",
        )

    @classmethod
    def _from_mapping(cls, loss: Mapping[str, Any], reduction: str) -> "LossSpec":
        options = loss.get("options") or {}
        if not isinstance(options, Mapping):
            raise EngineError(
                "invalid_option",
                f"a loss's options are a mapping; got {options!r}",
                param="loss.options",
                remedy='e.g. {"name": "cross_entropy", "options": {"ignore_index": 0}}',
            )
        return cls(loss["name"], options, reduction, loss.get("function"))

    @property
    def is_built_in(self) -> bool:
        """Whether the loss is one of the engine's own, neither a function nor a plug-in's."""
        return self.name != CUSTOM and self._kind.bind.__module__.startswith("curvature_engine.")

    def select(self, returned: Any) -> Tensor:
        """The tensor, of what the model returned, that enters the loss.

        Raises:
            EngineError: `unsupported_outputs`.
        """
        chosen: Any = returned
        if self.output is not None:
            if isinstance(returned, Tensor) or not isinstance(returned, tuple | list | dict):
                raise _unsupported(f"output={self.output!r} was asked for, the model returned {_describe(returned)}")
            chosen = _entry(returned, self.output)
        if isinstance(chosen, Tensor) and chosen.is_floating_point():
            return chosen
        raise _unsupported(
            f"the loss needs one floating-point tensor [N, …]; the model returned {_describe(returned)}"
            + ("" if self.output is None else f", and {_describe(chosen)} as {self.output!r}")
        )

    def bind(self, outputs: Tensor, targets: Tensor, first_sample: int | None = None) -> BoundLoss:
        """The loss on this batch; the default is cross-entropy for integer targets on [N, C] outputs.

        Of a part of a data set, which `first_sample` says where it begins, it is the sum, whatever the reduction.
        """
        self._check(outputs, targets)
        if first_sample is None:
            bound = self._kind.bind(outputs, targets, self.reduction, **self.options)
            if not bound.has_terms:
                raise without_terms()
            return bound
        self._check_options_of_part(outputs)
        bound = self._kind.bind(outputs, targets, "sum", **self.options)
        bound.first_sample = first_sample
        bound.Z_under_mean = self._kind.bind(outputs, targets, "mean", **self.options).Z
        return bound

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_batch(outputs, targets)
        if self._by_default:
            if not (holds_indices(targets) and outputs.dim() == 2 and targets.dim() == 1):
                raise EngineError(
                    "loss_required",
                    "a default loss exists only for integer targets [N] on outputs [N, C]; got outputs "
                    f"{list(outputs.shape)} and {dtype_name(targets.dtype)} targets {list(targets.shape)}",
                    param="loss",
                    remedy=f"say loss=, one of {', '.join(LOSSES)}",
                )
            self.name = "cross_entropy"

    def _check_options_of_part(self, outputs: Tensor) -> None:
        """Numbers given for every sample of a batch say nothing of another part's."""
        for option, value in self.options.items():
            shape = _shape_of(value)
            if len(shape) == outputs.dim() and shape[0] != 1:
                raise EngineError(
                    "whole_batch_required",
                    f"not over a data set in parts: the loss's {option} holds numbers for {shape[0]} samples",
                    param=f"loss.{option}",
                    remedy="give numbers that are the same for all samples, or all samples as one batch",
                )


def _shape_of(value: Any) -> list[int]:
    """Of nested lists of numbers; [] of anything else."""
    return [len(value), *_shape_of(value[0] if value else None)] if isinstance(value, list | tuple) else []


def _entry(returned: Any, output: int | str) -> Any:
    try:
        return returned[output]
    except (LookupError, TypeError):
        raise _unsupported(f"there is no output {output!r}: the model returned {_describe(returned)}") from None


def _default_kind() -> LossKind:
    return LOSSES["cross_entropy"]


def _find_kind(name: str, function: Any) -> LossKind:
    if name == CUSTOM and function is not None:
        return custom_loss(function)
    if name not in LOSSES:
        raise EngineError(
            "unknown_loss",
            f"there is no loss {name!r}",
            param="loss",
            remedy=f"known losses: {', '.join(LOSSES)}",
        )
    if function is not None:
        raise EngineError(
            "invalid_option",
            f"{name} takes no function",
            param="loss.function",
            remedy=f'call it {{"name": "{CUSTOM}", "function": …}}',
        )
    return LOSSES[name]


def _agreed(of_module: str, asked: str | None) -> str:
    """The reduction that a loss module brings, and the request may repeat."""
    if asked is not None and asked != of_module:
        raise EngineError(
            "invalid_option",
            f"the loss module says reduction={of_module!r}, the request {asked!r}",
            param="reduction",
            remedy="leave one of them out",
        )
    return of_module


def _check_batch(outputs: Tensor, targets: Tensor) -> None:
    if outputs.dim() < 1:
        raise _unsupported("the model must return [N, …], one row per sample; it returned a single number")
    if targets.dim() == 0 or targets.shape[0] != outputs.shape[0]:
        raise invalid_targets(
            f"the model returned {outputs.shape[0]} samples (outputs {list(outputs.shape)}), "
            f"the targets have shape {list(targets.shape)}",
            "give one target per sample, along the first axis",
        )


def _unsupported(message: str) -> EngineError:
    return EngineError(
        "unsupported_outputs",
        message,
        param="model",
        remedy='name an entry of a tuple or dictionary by the loss\'s option "output", e.g. {"name": "mse", "options": '
        '{"output": 0}}, or let forward return the tensor that enters the loss',
    )


def _describe(value: Any) -> str:
    """What the model returned, in words."""
    if isinstance(value, Tensor):
        return f"a {dtype_name(value.dtype)} tensor {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dictionary with {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
