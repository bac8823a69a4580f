"""What is watched during a run: parameters, and tensors made of nothing but parameters.

Operators that only move elements (transpose, slice, an embedding of constant positions …) give a *gather* of the
parameter, tracked by applying them to its indices. Any other operator that nothing of the batch enters gives a
*derived* tensor (a weight over its norm, the exponential of a scale, an index into the product of two matrices …). Its
individual gradients are pulled back to the parameter by autograd, through that small graph alone: φ(θ) is the same for
all samples, so ∂L_n/∂θ = Jφᵀ ∂L_n/∂φ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature_engine.differentiation import gradients


@dataclass(frozen=True)
class Derivation:
    """How a tensor was made of a parameter.

    Attributes:
        edge: of the derived tensor, taken when it was made.
        tensors: the parameter's own.
    """

    edge: GradientEdge
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]

    def pull_back(self, part: Tensor) -> Tensor:
        """Gradients [n, *derived] → [n, *parameter], one small backward each."""
        like = self.tensors[0]
        found = torch.zeros((len(part), *like.shape), dtype=part.dtype, device=like.device)
        for row, gradient in zip(found, part.to(self.dtype), strict=True):
            for each in gradients(self.edge, self.tensors, gradient.reshape(self.shape)):
                if each is not None:
                    row += each.to_dense() if each.is_sparse else each
        return found


@dataclass(frozen=True)
class Watched:
    """A parameter, or what was made of it.

    `index` holds, in a gathered tensor's shape, each element's position in the flattened parameter; None means the
    parameter as it is.
    """

    parameter: str
    tensor: Tensor
    index: Tensor | Derivation | None
    version: int
    tensors: tuple[Tensor, ...]
    """The parameter's own tensors."""
    origins: frozenset[int] = frozenset()
    """Numbers of the provisional taps that lie between it and the parameter."""

    @property
    def intact(self) -> bool:
        """Whether the tensor still holds what it was made with: it may have been edited since."""
        return self.tensor._version == self.version

    @cached_property
    def rows_alike(self) -> bool:
        """Whether all entries of the first axis are copies of one (`expand`, `repeat`)."""
        if self.tensor.dim() == 0:
            return False
        if self.tensor.shape[0] == 1 or self.tensor.stride(0) == 0:
            return True
        return isinstance(self.index, Tensor) and bool((self.index == self.index[:1]).all())

    def moved(self, tensor: Tensor, move: Callable[[Tensor], Tensor]) -> "Watched":
        """The gather `tensor` that an operator made of this parameter or gather."""
        assert not isinstance(self.index, Derivation)
        index = self.index
        if index is None:
            index = torch.arange(self.tensor.numel(), device=self.tensor.device).view(self.tensor.shape)
        with torch.no_grad():
            return Watched(self.parameter, tensor, move(index), tensor._version, self.tensors)

    def derived(self, tensor: Tensor, origin: int | None = None) -> "Watched":
        """The tensor that an operator made of this one, and maybe of others; `origin` is its provisional tap."""
        derivation = Derivation(get_gradient_edge(tensor), tuple(tensor.shape), tensor.dtype, self.tensors)
        origins = self.origins if origin is None else self.origins | {origin}
        return Watched(self.parameter, tensor, derivation, tensor._version, self.tensors, origins)

    def first_row(self) -> "Watched":
        """The first entry of the first axis, which is kept."""
        with torch.enable_grad():
            row = self.tensor[:1]
        return self.derived(row) if isinstance(self.index, Derivation) else self.moved(row, lambda index: index[:1])

    def reciprocal(self) -> "Watched":
        """One over it."""
        with torch.enable_grad():
            return self.derived(self.tensor.reciprocal())


def pull_back(part: Tensor, index: Tensor | Derivation | None, shape: Sequence[int]) -> Tensor:
    """From gradients of a consumed tensor [n, …] to those of the parameter it was made of, [n, *shape]."""
    if index is None:
        return part.reshape(part.shape[0], *shape)
    if isinstance(index, Derivation):
        return index.pull_back(part)
    flat = part.new_zeros(part.shape[0], math.prod(shape))
    flat.index_add_(1, index.reshape(-1), part.reshape(part.shape[0], -1))
    return flat.view(part.shape[0], *shape)
