"""Embedding: rows of the weight picked by indices of the batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
        found = self._sums(saved[0], g)
        return g.new_zeros(self._V, g.shape[2]).index_add_(0, found.keys % self._V, found.sums.square())

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        found = self._sums(saved[0], g)
        return g.new_zeros(g.shape[0]).index_add_(0, found.keys // self._V, found.sums.square().sum(1))

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        return True

    def moments(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Moments | None:
        """Of each row of the weight: from the samples that picked it, and how many did not.

        Those are at zero, each mean² away.
        """
        found, n = self._sums(saved[0], g), g.shape[0]
        rows = found.keys % self._V
        mean = g.new_zeros(self._V, g.shape[2]).index_add_(0, rows, found.sums).div_(n)
        others = n - g.new_zeros(self._V).index_add_(0, rows, found.used.to(g.dtype))
        spread = mean.square().mul_(others[:, None])
        return Moments(mean, spread.index_add_(0, rows, (found.sums - mean[rows]).square_() * found.used[:, None]))

    def _keys(self, indices: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """One key per (sample, row of the weight), and g with the padding's rows at zero."""
        samples = torch.arange(g.shape[0], device=g.device)[:, None] * self._V
        if self._padding >= 0:
            g = g * (indices != self._padding)[..., None]
        return (indices + samples).flatten(), g.flatten(0, 1)

    def _sums(self, indices: Tensor, g: Tensor) -> "_Sums":
        """The sum of the gradients of each picked (sample, row)."""
        keys, g = self._keys(indices, g)
        unique, place = _with_places(keys) if keys.device.type == "cpu" else _with_places_unread(keys)
        sums = g.new_zeros(len(unique), g.shape[1]).index_add_(0, place, g)
        last = place.amax() if len(place) else 0
        return _Sums(unique, sums, torch.arange(len(unique), device=g.device) <= last)


class _Sums(NamedTuple):
    """Per key, its gradients' sum: [K], [K, D]; where `used` [K] is false it is nothing's, and zero."""

    keys: Tensor
    sums: Tensor
    used: Tensor


def _with_places(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Each key once, in order, and where each is found among them."""
    unique: Tensor
    unique, place = torch.unique(keys, return_inverse=True)
    return unique, place


def _with_places_unread(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with zeros after the last one, so that nobody need read from a device how many there are."""
    ordered, order = keys.sort()
    begins = torch.ones_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    places = begins.cumsum(0) - 1
    unique = torch.zeros_like(keys).scatter_(0, places, ordered)
    return unique, torch.empty_like(places).scatter_(0, order, places)


@gives(EmbeddingRule)
def match_embedding(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`embedding(W, indices, padding_index, …)`."""
    weight, indices, padding, *_ = (*arguments[:3], -1)
    if watched.keys() != {0}:
        return None
    return Match(EmbeddingRule(indices.dim(), weight.shape[0], padding), {0: "weight"}, (indices,))
