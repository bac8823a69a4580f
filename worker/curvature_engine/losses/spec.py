"""A loss as asked for: read, checked, and bound to a batch."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvature_engine.errors import EngineError
from curvature_engine.losses.base import BoundLoss, invalid_targets
from curvature_engine.losses.registry import LOSSES
from curvature_engine.options import complete_options
from curvature_engine.precision import dtype_name


class LossSpec:
    """A loss as asked for: name, options, reduction."""

    _MODULE_DEFAULTS: ClassVar[dict[str, Any]] = {"weight": None, "label_smoothing": 0.0}

    def __init__(self, name: str | None, options: Mapping[str, Any], reduction: str) -> None:
        if reduction not in ("mean", "sum"):
            raise EngineError(
                "invalid_option",
                f'reduction must be "mean" or "sum"; got {reduction!r}',
                param="reduction",
                remedy="choose one of the two",
            )
        self.name, self.options, self.reduction = name, dict(options), reduction
        if name is not None:
            self._check(name)

    @classmethod
    def parse(cls, loss: Any, reduction: str | None) -> "LossSpec":
        """Read a loss given as None, a name, a mapping, or one of torch's loss modules."""
        if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss):
            if reduction is not None and reduction != loss.reduction:
                raise EngineError(
                    "invalid_option",
                    f"the loss module says reduction={loss.reduction!r}, the request {reduction!r}",
                    param="reduction",
                    remedy="leave one of them out",
                )
            return cls(*cls._from_module(loss), loss.reduction)
        reduction = "mean" if reduction is None else reduction
        if loss is None or isinstance(loss, str):
            return cls(loss, {}, reduction)
        if isinstance(loss, Mapping) and isinstance(loss.get("name"), str):
            options = loss.get("options") or {}
            if not isinstance(options, Mapping):
                raise EngineError(
                    "invalid_option",
                    f"a loss's options are a mapping; got {options!r}",
                    param="loss.options",
                    remedy='e.g. {"name": "cross_entropy", "options": {"ignore_index": 0}}',
                )
            return cls(loss["name"], options, reduction)
        raise EngineError(
            "unknown_loss",
            f"a loss is a name, a mapping with a name, or a loss module; got {type(loss).__name__}",
            param="loss",
            remedy=f"known losses: {', '.join(LOSSES)}",
        )

    @classmethod
    def _from_module(cls, loss: nn.Module) -> tuple[str, dict[str, Any]]:
        if isinstance(loss, nn.MSELoss):
            return "mse", {}
        for option, default in cls._MODULE_DEFAULTS.items():
            if getattr(loss, option) is not default and getattr(loss, option) != default:
                raise EngineError(
                    "invalid_option",
                    f"cross_entropy does not take {option} yet",
                    param=f"loss.{option}",
                    remedy="leave it at its default",
                )
        ignore_index = int(loss.ignore_index)  # type: ignore[arg-type]
        return "cross_entropy", {} if ignore_index == -100 else {"ignore_index": ignore_index}

    def _check(self, name: str) -> None:
        if name not in LOSSES:
            raise EngineError(
                "unknown_loss",
                f"there is no loss {name!r}",
                param="loss",
                remedy=f"known losses: {', '.join(LOSSES)}",
            )
        self.options = complete_options(name, LOSSES[name].options, self.options, "loss")

    def bind(self, outputs: Tensor, targets: Tensor) -> BoundLoss:
        """The loss on this batch; the default is cross-entropy for integer targets on [N, C] outputs."""
        _check_batch(outputs, targets)
        if self.name is None:
            integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
            if not (integer and outputs.dim() == 2 and targets.dim() == 1):
                raise EngineError(
                    "loss_required",
                    "a default loss exists only for integer targets [N] on outputs [N, C]; got outputs "
                    f"{list(outputs.shape)} and {dtype_name(targets.dtype)} targets {list(targets.shape)}",
                    param="loss",
                    remedy=f"say loss=, one of {', '.join(LOSSES)}",
                )
            self.name = "cross_entropy"
        return LOSSES[self.name].bind(outputs, targets, self.reduction, **self.options)


def _check_batch(outputs: Tensor, targets: Tensor) -> None:
    if outputs.dim() < 2:
        raise EngineError(
            "unsupported_outputs",
            f"the model must return [N, …] with at least two axes; it returned {list(outputs.shape)}",
            param="model",
            remedy="return one row per sample, e.g. unsqueeze(1)",
        )
    if targets.dim() == 0 or targets.shape[0] != outputs.shape[0]:
        raise invalid_targets(
            f"the model returned {outputs.shape[0]} samples (outputs {list(outputs.shape)}), "
            f"the targets have shape {list(targets.shape)}",
            "give one target per sample, along the first axis",
        )
