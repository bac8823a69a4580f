"""Softmax cross-entropy, with class indices or probabilities as targets."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_engine import draws
from curvature_engine.losses.base import LossKind, invalid_targets
from curvature_engine.losses.classes import CLASS_AXIS, IGNORE_INDEX, WEIGHT, ClassLoss, along_classes
from curvature_engine.options import Options
from curvature_engine.speculation import answer

_SUMMED_NUMBERS = 2**17
"""Probabilities that are summed up at a time."""


class CrossEntropy(ClassLoss):
    """ℓ̃ = −Σ_c a_c log p_c with a_c = w_c q_c, q the target smoothed by ε, p the softmax.

    With c = Σ a: gradient c p − a, Hessian c (diag p − p pᵀ). Columns: √c √p_k (δ_vk − √(p_v p_k)), for position t as
    column k·T + t (Dangel et al. 2020, appendix). Sampled: √c (p − onehot), the label drawn from p.

    The Hessian has rank C − 1. With q_k = Σ_i≥k p_i its Cholesky root has √c √(p_k q_k+1/q_k) at class k of column k,
    and −√c p_i √(p_k/(q_k q_k+1)) at i > k (Tanabe & Sagae 1992). Nothing cancels in it, however peaked p is.

    Attributes:
        mass: c, [N, T].
    """

    name = "cross_entropy"
    expectation = (
        "cross_entropy expects class indices (int64) {indices}, or probabilities of the outputs' shape {outputs}"
    )
    mass: Tensor

    def __init__(
        self, outputs: Tensor, targets: Tensor, class_axis: str | None, weight: Sequence[float] | None
    ) -> None:
        super().__init__(outputs, targets, class_axis, weight)
        self._p = along_classes(torch.softmax, self.scores)
        self.columns = self.C * self.T

    @abstractmethod
    def _terms(self, log_p: Tensor) -> Tensor:
        """ℓ̃ from the logarithms of p [N, C, T]: [N, T]."""

    @abstractmethod
    def _minus_target(self, scaled: Tensor) -> Tensor:
        """`scaled` − a, [N, C, T], a tensor of its own; may edit `scaled`."""

    def contributions(self) -> Tensor:
        return self._terms(along_classes(torch.log_softmax, self.scores)).sum(1) / self.Z

    def gradient(self) -> Tensor:
        return self._shaped(self._minus_target(self._p * self.mass[:, None]).div_(self.Z))

    def exact_column(self, v: int) -> Tensor:
        k, t = divmod(v, self.T)
        p = self._p[:, :, t]
        part = -p * p[:, k : k + 1].sqrt()
        part[:, k] += p[:, k].sqrt()
        column = torch.zeros_like(self._p)
        column[:, :, t] = part * (self.mass[:, t, None] / self.Z).sqrt()
        return self._shaped(column)

    @property
    def rank(self) -> int:
        return max(1, self.C - 1) * self.T

    def root_column(self, v: int) -> Tensor:
        k, t = divmod(v, self.T)
        p = self._p[:, k:, t]
        after = p[:, 1:].sum(1)
        # Where no later class has a probability above zero, the column is zero: what follows would be 0/0.
        root = torch.where(after == 0, 0.0, (p[:, 0] / (p[:, 0] + after)).sqrt() / after.sqrt())
        part = p * -root[:, None]
        part[:, 0] = after * root
        column = torch.zeros_like(self._p)
        column[:, k:, t] = part * (self.mass[:, t, None] / self.Z).sqrt()
        return self._shaped(column)

    def root_columns(self, first: int, stop: int) -> Tensor:
        if self.T > 1 or self.C == 1:
            return super().root_columns(first, stop)
        p = self._p[:, :, 0]
        # Sums of what is not negative: in float64 none is further off than one made by itself.
        after = p.double().flip(1).cumsum(1).flip(1)[:, first + 1 : stop + 1].to(p.dtype)  # [N, k]
        own = p[:, first:stop]
        root = torch.where(after == 0, 0.0, (own / (own + after)).sqrt() / after.sqrt())
        root = root * (self.mass / self.Z).sqrt()
        columns = (p[:, None, :] * -root[:, :, None]).triu_(first + 1)  # [N, k, C]: of later classes
        columns.diagonal(first, 1, 2).copy_(after * root)
        return self._shaped_several(columns.transpose(0, 1))

    def _shaped_several(self, columns: Tensor) -> Tensor:
        """[k, N, C] in the outputs' own shape, where there is one position."""
        columns = columns.reshape(-1, *self._moved_shape)
        return columns if self._axis == 1 else columns.movedim(2, 1 + self._axis)

    def summed_hessian(self) -> Tensor:
        if self.T == 1:
            p = self._p[:, :, 0]
            total = (p * (self.mass / -self.Z)).T @ p
            # Rows add up to zero. From the others, the diagonal's c p (1 − p) loses nothing where p is nearly 1.
            total.fill_diagonal_(0)
            total.diagonal().sub_(total.sum(1))
            return total
        p = self._p.permute(2, 1, 0)  # [T, C, N]
        mass = (self.mass / self.Z).T[:, None]
        blocks = -(p * mass) @ p.mT
        blocks.diagonal(dim1=1, dim2=2).zero_()
        blocks.diagonal(dim1=1, dim2=2).copy_(-blocks.sum(2))
        order = torch.arange(self.C * self.T, device=p.device).view(1, self.C, self.T).expand(self.N, -1, -1)
        order = self._shaped(order)[0].reshape(-1)
        total = blocks.new_zeros(self.C, self.T, self.C, self.T)
        total.diagonal(dim1=1, dim2=3).copy_(blocks.permute(1, 2, 0))
        return total.view(self.C * self.T, -1)[order][:, order]

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        positions = torch.arange(self.T, device=self._p.device)
        u = draws.uniform(seed, self._samples(), positions, draw)  # [N, T]
        labels = self._labels_below(u)[:, None]
        scale = (self.mass / self.Z).sqrt()[:, None]
        score = self._p * scale
        return self._shaped(score.scatter_(1, labels, (self._p.gather(1, labels) - 1) * scale))

    def _labels_below(self, u: Tensor) -> Tensor:
        """Where the summed probabilities first exceed u: [N, T]. A few samples at a time use the same memory again."""
        labels, size = torch.empty(u.shape, dtype=torch.int64, device=u.device), self.N
        if u.device.type == "cpu":
            size = max(1, _SUMMED_NUMBERS // (self.C * self.T))
        for first in range(0, self.N, size):
            block = slice(first, first + size)
            rows = self._p[block].transpose(1, 2)
            cumulative = rows.to(torch.float64, memory_format=torch.contiguous_format, copy=True).cumsum_(2)
            thresholds = u[block, :, None] * cumulative[:, :, -1:]
            labels[block] = torch.searchsorted(cumulative, thresholds, right=True)[:, :, 0]
        return labels.clamp_(max=self.C - 1)


class IndexCrossEntropy(CrossEntropy):
    """Class indices: a_c = (1−ε) w_y δ_cy + (ε/C) w_c; under mean Z = Σ w_y over terms that are not ignored."""

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        reduction: str,
        *,
        weight: Sequence[float] | None,
        label_smoothing: float,
        ignore_index: int,
        class_axis: str | None,
    ) -> None:
        super().__init__(outputs, targets, class_axis, weight)
        self._read_indices(targets, ignore_index)
        self._on_label = self.mass = self.label_weights
        self._smooth = label_smoothing > 0.0
        if self._smooth:
            self._on_label = (1.0 - label_smoothing) * self.label_weights
            self._on_each = self.weights * (label_smoothing / self.C)
            self.mass = self._on_label + self._on_each.sum() * self.counts
        self.Z = self.total_weight if reduction == "mean" else 1.0

    def _terms(self, log_p: Tensor) -> Tensor:
        terms = log_p.gather(1, self.labels[:, None]).squeeze(1).neg_()
        if not self._alike or self._smooth:
            terms *= self._on_label
        if self._smooth:
            terms -= (log_p * self._on_each[:, None]).sum(1)
        if self._alike:
            return terms
        return torch.where(self.counts > 0, terms, 0.0)

    def _minus_target(self, scaled: Tensor) -> Tensor:
        scaled.scatter_add_(1, self.labels[:, None], -self._on_label[:, None])
        if self._smooth:
            scaled -= self._on_each[:, None] * self.counts[:, None]
        return scaled


class ProbabilityCrossEntropy(CrossEntropy):
    """Probabilities q of the outputs' shape: a = w ((1−ε) q + ε/C); under mean Z is the number of terms N·T."""

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        reduction: str,
        *,
        weight: Sequence[float] | None,
        label_smoothing: float,
        class_axis: str | None,
    ) -> None:
        super().__init__(outputs, targets, class_axis, weight)
        if answer((targets < 0).any()):
            raise invalid_targets(
                f"probabilities as targets must not be negative; got {float(targets.min()):.6g}",
                "give probabilities, not scores",
            )
        q = targets.to(self.outputs.dtype).movedim(self._axis, 1).reshape(self.scores.shape)
        self._a = self.weights[:, None] * ((1.0 - label_smoothing) * q + label_smoothing / self.C)
        self.mass = self._a.sum(1)
        self.Z = float(self.N * self.T) if reduction == "mean" else 1.0

    def _terms(self, log_p: Tensor) -> Tensor:
        return -(self._a * log_p).sum(1)

    def _minus_target(self, scaled: Tensor) -> Tensor:
        return scaled - self._a


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    reduction: str,
    *,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_axis: str | None = None,
) -> CrossEntropy:
    """Cross-entropy with floating targets of the outputs' shape as probabilities, others as class indices.

    `ignore_index` is of no consequence for probabilities.
    """
    if targets.is_floating_point() and targets.shape == outputs.shape and outputs.dim() > 1:
        return ProbabilityCrossEntropy(
            outputs, targets, reduction, weight=weight, label_smoothing=label_smoothing, class_axis=class_axis
        )
    return IndexCrossEntropy(
        outputs,
        targets,
        reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        class_axis=class_axis,
    )


_OPTIONS: Options = {
    "weight": WEIGHT,
    "label_smoothing": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.0,
        "description": "ε: this much of each target is spread evenly over the classes",
    },
    "ignore_index": IGNORE_INDEX,
    "class_axis": CLASS_AXIS,
}

CROSS_ENTROPY = LossKind(
    cross_entropy,
    "softmax cross-entropy of logits [N, C, …] (or [N, …, C]) and class indices [N, …] or probabilities",
    _OPTIONS,
)
