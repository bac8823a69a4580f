"""Losses: value, gradient, and square root of the Hessian in the model's outputs, exact and sampled.

Every loss is bound to one batch: outputs f [N, …] and targets. `docs` of scaling: L = (1/Z) Σ ℓ̃ over terms.
A new loss is one class here or in a file of its own, and one line in `LOSSES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvature_engine import draws
from curvature_engine.errors import EngineError
from curvature_engine.options import Options, complete_options


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class BoundLoss(ABC):
    """A loss on one batch.

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


class CrossEntropy(BoundLoss):
    """Softmax cross-entropy with class indices: f [N, C] or [N, C, d…], targets [N] or [N, d…].

    Columns: √p_c (δ_vc − √(p_v p_c)), for position t as column v·T + t (Dangel et al. 2020, appendix).
    """

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str, ignore_index: int = -100) -> None:
        super().__init__(outputs)
        _check_class_targets(outputs, targets, ignore_index)
        N, C = outputs.shape[:2]
        self._logits = self.outputs.reshape(N, C, -1)  # [N, C, T]
        self._targets = targets.long().reshape(N, -1)  # [N, T]
        self._counts = (self._targets != ignore_index).to(self.outputs.dtype)  # [N, T]
        self._labels = self._targets.clamp(0, C - 1)
        self._p = self._logits.softmax(1)
        self.Z = float(self._counts.sum()) if reduction == "mean" else 1.0
        self.columns = C * self._logits.shape[2]

    def contributions(self) -> Tensor:
        terms = -self._logits.log_softmax(1).gather(1, self._labels[:, None]).squeeze(1)
        return (torch.where(self._counts > 0, terms, 0.0)).sum(1) / self.Z

    def gradient(self) -> Tensor:
        return self._shaped(self._score(self._labels) / self.Z)

    def exact_column(self, v: int) -> Tensor:
        T = self._logits.shape[2]
        c, t = divmod(v, T)
        column = torch.zeros_like(self._p)
        p = self._p[:, :, t]
        column[:, :, t] = -p * p[:, c : c + 1].sqrt()
        column[:, c, t] += p[:, c].sqrt()
        return self._shaped(column * (self._counts[:, None] / self.Z**0.5))

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        positions = torch.arange(self._p.shape[2], device=self._p.device)
        u = draws.uniform(seed, self._samples(), positions, draw)  # [N, T]
        cumulative = self._p.double().cumsum(1)
        thresholds = u[:, None] * cumulative[:, -1:]
        labels = (cumulative <= thresholds).sum(1).clamp_(max=self._p.shape[1] - 1)
        return self._shaped(self._score(labels) / self.Z**0.5)

    def _score(self, labels: Tensor) -> Tensor:
        """Gradient of the unreduced terms at `labels` [N, T] in the logits: p − onehot, [N, C, T]."""
        ones = torch.ones_like(self._p[:, :1])
        return self._p.scatter_add(1, labels[:, None], -ones) * self._counts[:, None]

    def _shaped(self, column: Tensor) -> Tensor:
        return column.reshape(self.outputs.shape)


class SquaredError(BoundLoss):
    """Squared error: f and targets of one shape [N, …]; under mean divided by N·D.

    Columns: √2·I. Sampled: targets from a Normal of variance ½ around f, so that E s̃ s̃ᵀ = 2 I.
    """

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str) -> None:
        super().__init__(outputs)
        if targets.shape != outputs.shape:
            raise EngineError(
                "invalid_targets",
                f"squared error expects targets of the outputs' shape {list(outputs.shape)}; got {list(targets.shape)}",
                param="targets",
                remedy="reshape the targets",
            )
        if targets.is_complex() or targets.dtype == torch.bool:
            raise EngineError(
                "invalid_targets",
                f"squared error expects real targets; got {_name(targets.dtype)}",
                param="targets",
                remedy="cast them to a floating-point type",
            )
        self._residual = self.outputs - targets.to(self.outputs.dtype)
        self.columns = self._residual[0].numel()
        self.Z = float(self._residual.numel()) if reduction == "mean" else 1.0

    def contributions(self) -> Tensor:
        return self._residual.square().flatten(1).sum(1) / self.Z

    def gradient(self) -> Tensor:
        return 2.0 * self._residual / self.Z

    def exact_column(self, v: int) -> Tensor:
        column = torch.zeros_like(self._residual)
        column.view(self.N, -1)[:, v] = (2.0 / self.Z) ** 0.5
        return column

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        positions = torch.arange(self.columns, device=self.outputs.device)
        z = draws.normal(seed, self._samples(), positions, draw).to(self.outputs.dtype)
        column: Tensor = z.reshape(self.outputs.shape) * (2.0 / self.Z) ** 0.5
        return column


@dataclass(frozen=True)
class LossKind:
    """An entry of the registry of losses."""

    bind: Callable[..., BoundLoss]
    summary: str
    options: Options = field(default_factory=dict)


LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind(
        CrossEntropy,
        "softmax cross-entropy of logits [N, C, …] and class indices [N, …]",
        {"ignore_index": {"type": "integer", "default": -100, "description": "targets that count for nothing"}},
    ),
    "mse": LossKind(SquaredError, "squared error of outputs and targets of one shape [N, …]"),
}


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
                    f"{list(outputs.shape)} and {_name(targets.dtype)} targets {list(targets.shape)}",
                    param="loss",
                    remedy=f"say loss=, one of {', '.join(LOSSES)}",
                )
            self.name = "cross_entropy"
        return LOSSES[self.name].bind(outputs, targets, self.reduction, **self.options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_batch(outputs: Tensor, targets: Tensor) -> None:
    if outputs.dim() < 2:
        raise EngineError(
            "unsupported_outputs",
            f"the model must return [N, …] with at least two axes; it returned {list(outputs.shape)}",
            param="model",
            remedy="return one row per sample, e.g. unsqueeze(1)",
        )
    if targets.dim() == 0 or targets.shape[0] != outputs.shape[0]:
        raise EngineError(
            "invalid_targets",
            f"the model returned {outputs.shape[0]} samples (outputs {list(outputs.shape)}), "
            f"the targets have shape {list(targets.shape)}",
            param="targets",
            remedy="give one target per sample, along the first axis",
        )


def _check_class_targets(outputs: Tensor, targets: Tensor, ignore_index: int) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise EngineError(
            "invalid_targets",
            f"targets have dtype {_name(targets.dtype)}; cross_entropy expects class indices (int64)",
            param="targets",
            remedy="cast them",
        )
    targets = targets.long()  # unsigned types compare with nothing negative
    expected = [outputs.shape[0], *outputs.shape[2:]]
    if list(targets.shape) != expected:
        raise EngineError(
            "invalid_targets",
            f"cross_entropy on outputs {list(outputs.shape)} expects targets {expected}; got {list(targets.shape)}",
            param="targets",
            remedy="classes stand along the outputs' second axis; targets hold one class index per position",
        )
    C = outputs.shape[1]
    valid = (targets != ignore_index) & ((targets < 0) | (targets >= C))
    if bool(valid.any()):
        worst = int(targets[valid][0])
        raise EngineError(
            "invalid_targets",
            f"class indices must lie in 0 … {C - 1} for outputs {list(outputs.shape)}; got {worst}",
            param="targets",
            remedy="check the number of classes of the model and of the data",
        )
    if not bool((targets != ignore_index).any()):
        raise EngineError(
            "invalid_targets",
            "every target is ignore_index: no term is left",
            param="targets",
            remedy="leave at least one target that counts",
        )
