"""Softmax cross-entropy."""

import torch
from torch import Tensor

from curvature_engine import draws
from curvature_engine.losses.base import BoundLoss, LossKind, invalid_targets
from curvature_engine.precision import dtype_name


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


def _check_class_targets(outputs: Tensor, targets: Tensor, ignore_index: int) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise invalid_targets(
            f"targets have dtype {dtype_name(targets.dtype)}; cross_entropy expects class indices (int64)",
            "cast them",
        )
    targets = targets.long()  # unsigned types compare with nothing negative
    expected = [outputs.shape[0], *outputs.shape[2:]]
    if list(targets.shape) != expected:
        raise invalid_targets(
            f"cross_entropy on outputs {list(outputs.shape)} expects targets {expected}; got {list(targets.shape)}",
            "classes stand along the outputs' second axis; targets hold one class index per position",
        )
    C = outputs.shape[1]
    valid = (targets != ignore_index) & ((targets < 0) | (targets >= C))
    if bool(valid.any()):
        worst = int(targets[valid][0])
        raise invalid_targets(
            f"class indices must lie in 0 … {C - 1} for outputs {list(outputs.shape)}; got {worst}",
            "check the number of classes of the model and of the data",
        )
    if not bool((targets != ignore_index).any()):
        raise invalid_targets(
            "every target is ignore_index: no term is left",
            "leave at least one target that counts",
        )


CROSS_ENTROPY = LossKind(
    CrossEntropy,
    "softmax cross-entropy of logits [N, C, …] and class indices [N, …]",
    {"ignore_index": {"type": "integer", "default": -100, "description": "targets that count for nothing"}},
)
