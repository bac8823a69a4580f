"""Embedding: rows of the weight picked by indices of the batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine.reductions import Moments
from curvature_engine.rules.base import Match, Rule, gives


class EmbeddingRule(Rule):
    """Gradients scatter to the rows that a sample picked; the padding row gets none."""

    scatters = True

    def __init__(self, row_axes: int, rows_in_weight: int, padding_index: int) -> None:
        self.row_axes = row_axes
        self._V = rows_in_weight
        self._padding = padding_index

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        gradient = g.new_zeros(g.shape[0], self._V, g.shape[2])
        self.add_per_sample(role, saved, g, gradient)
        return gradient

    def per_sample_into(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> bool:
        self.add_per_sample(role, saved, g, out.zero_())
        return True

    def add_per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> None:
        keys, g = self._keys(saved[0], g)
        out.view(-1, out.shape[2]).index_add_(0, keys, g)

    def sum_squared(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        picked, sums = self._sums(saved[0], g)
        return g.new_zeros(self._V, g.shape[2]).index_add_(0, picked % self._V, sums.square())

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        picked, sums = self._sums(saved[0], g)
        return g.new_zeros(g.shape[0]).index_add_(0, picked // self._V, sums.square().sum(1))

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        return True

    def moments(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Moments | None:
        """Of each row of the weight: from the samples that picked it, and how many did not.

        Those are at zero, each mean² away.
        """
        picked, sums = self._sums(saved[0], g)
        rows, n = picked % self._V, g.shape[0]
        mean = g.new_zeros(self._V, g.shape[2]).index_add_(0, rows, sums).div_(n)
        others = n - torch.bincount(rows, minlength=self._V)
        spread = mean.square().mul_(others[:, None])
        return Moments(mean, spread.index_add_(0, rows, (sums - mean[rows]).square_()))

    def _keys(self, indices: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """One key per (sample, row of the weight), and g with the padding's rows at zero."""
        samples = torch.arange(g.shape[0], device=g.device)[:, None] * self._V
        if self._padding >= 0:
            g = g * (indices != self._padding)[..., None]
        return (indices + samples).flatten(), g.flatten(0, 1)

    def _sums(self, indices: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Each picked (sample, row) once, with the sum of its gradients: [K], [K, D]."""
        keys, g = self._keys(indices, g)
        picked, place = torch.unique(keys, return_inverse=True)
        return picked, g.new_zeros(len(picked), g.shape[1]).index_add_(0, place, g)


@gives(EmbeddingRule)
def match_embedding(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`embedding(W, indices, padding_index, …)`."""
    weight, indices, padding, *_ = (*arguments[:3], -1)
    if watched.keys() != {0}:
        return None
    return Match(EmbeddingRule(indices.dim(), weight.shape[0], padding), {0: "weight"}, (indices,))
