"""Affine parts of normalisation layers: y = x̂ w + b, with x̂ the normalised input.

Batch normalisation only with its running statistics: in training mode it couples the samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature_engine.precision import accumulation_dtype
from curvature_engine.rules.base import Match, Rule, gives

_HOT_NUMBERS = 2**18
"""Of a normalised input, which stays in the cores' own caches."""


class AffineRule(Rule):
    """Gradients x̂ g and g, summed over everything that shares a weight.

    Args:
        row_axes: leading axes of the output that are rows.
        weight_axes: how many axes right after the rows the weight spans; further ones are summed over.
        normalize: saved inputs → x̂, of the output's shape.
    """

    def __init__(self, row_axes: int, weight_axes: int, normalize: Callable[..., Tensor]) -> None:
        self.row_axes = row_axes
        self._weight_axes = weight_axes
        self._normalize = normalize

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self._normalize(*(t.to(accumulation_dtype(t.dtype)) for t in saved)),) if saved else ()

    def magnitude(self, row: Tensor) -> Tensor:
        return _normalized_magnitude(row)

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        product = g if role == "bias" else g * saved[0]
        summed = (1, *range(2 + self._weight_axes, product.dim()))
        return product.sum(summed)


class FrozenNormRule(Rule):
    """The affine part of a normalisation with given statistics, one mean and variance a channel.

    What is normalised is as large as the input, so on CPUs it is made of few samples at a time.

    Args:
        mean: [channels].
        variance: [channels].
        eps: added to the variance.
        space: how many axes come after the channels.
    """

    row_axes = 1
    sums = True

    def __init__(self, mean: Tensor, variance: Tensor, eps: float, space: int) -> None:
        self._mean, self._variance, self._eps, self._space = mean, variance, eps, space
        self._known: tuple[tuple[torch.dtype, int, int], tuple[Tensor, Tensor]] | None = None

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (saved[0],) if saved else ()

    def magnitude(self, row: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(row.dtype)
        return (_normalized_magnitude(self._normalized(row)) - shift) / scale

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        summed = (1, *range(3, g.dim()))
        if role == "bias":
            return g.sum(summed)
        x = saved[0]
        if g.device.type != "cpu" or torch.is_grad_enabled():
            return (self._normalized(x) * g).sum(summed)
        return self._in_parts(x, g, summed)

    def sum_squared(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        return self.per_sample(role, saved, g).square().sum(0) if g.device.type == "cpu" else None

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        return self.per_sample(role, saved, g).square().sum(1) if g.device.type == "cpu" else None

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        return g.device.type == "cpu"

    def _in_parts(self, x: Tensor, g: Tensor, summed: tuple[int, ...]) -> Tensor:
        """Σ x̂ g, few samples at a time in one place, where they stay in the caches."""
        scale, _ = self._scale_and_shift(g.dtype)
        size = max(1, _HOT_NUMBERS // max(1, g[:1].numel()))
        place = torch.empty_like(x[:size], dtype=g.dtype)
        # Written out: a loop over a sample's numbers is several times as fast as one over its channels' alone.
        mean = torch.empty_like(x[:1], dtype=g.dtype).copy_(self._mean.view(scale.shape))
        parts = []
        for some, others in zip(torch.split(x, size), torch.split(g, size), strict=True):
            centred = torch.sub(some, mean, out=place[: len(some)])
            parts.append(centred.mul_(others).sum(summed))
        return torch.cat(parts).mul_(scale.flatten())

    def _normalized(self, x: Tensor) -> Tensor:
        """X [..., channels, *space], normalised."""
        scale, shift = self._scale_and_shift(x.dtype)
        return torch.addcmul(shift, x, scale)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = dtype, self._mean._version, self._variance._version
        if self._known is None or self._known[0] != key:
            shape = (-1, *[1] * self._space)
            scale = torch.rsqrt(self._variance.to(dtype) + self._eps)
            self._known = key, (scale.view(shape), -(self._mean.to(dtype) * scale).view(shape))
        return self._known[1]


@gives(FrozenNormRule)
def match_batch_norm(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`batch_norm(x, w, b, mean, variance, training, momentum, eps)` in eval mode."""
    if name == "_native_batch_norm_legit_no_training":
        arguments = (*arguments[:5], False, *arguments[5:])
    x, _, _, mean, variance, training, _, eps = arguments[:8]
    if not watched.keys() <= {1, 2} or training or x.dim() < 2:
        return None
    return _match(FrozenNormRule(mean, variance, eps, x.dim() - 2), watched, (x, mean, variance), weight=1)


@gives(AffineRule)
def match_instance_norm(
    name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor
) -> Match | None:
    """`instance_norm(x, w, b, mean, variance, use_input_statistics, momentum, eps)`."""
    x, _, _, _, _, use_input, _, eps = arguments[:8]
    if not use_input:
        return match_batch_norm(name, arguments, watched, output)
    if not watched.keys() <= {1, 2} or x.dim() < 3:
        return None
    return _match(AffineRule(1, 1, lambda x: F.instance_norm(x, eps=eps)), watched, (x,), weight=1)


@gives(AffineRule)
def match_layer_norm(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`layer_norm(x, shape, w, b, eps)`."""
    x, shape, _, _, eps = (*arguments[:5], 1e-5)[:5]
    if not watched.keys() <= {2, 3}:
        return None
    axes = len(shape)
    rule = AffineRule(x.dim() - axes, axes, lambda x: F.layer_norm(x, shape, None, None, eps))
    return _match(rule, watched, (x,), weight=2)


@gives(AffineRule)
def match_rms_norm(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`rms_norm(x, shape, w, eps)`; eps None means the input dtype's machine epsilon."""
    x, shape, _, eps = (*arguments[:4], None)[:4]
    if watched.keys() != {2}:
        return None
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rule = AffineRule(x.dim() - len(shape), len(shape), lambda x: F.rms_norm(x, shape, None, eps))
    return _match(rule, watched, (x,), weight=2)


@gives(AffineRule)
def match_group_norm(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`group_norm(x, groups, w, b, eps)`, and `native_group_norm(x, w, b, N, C, positions, groups, eps)`."""
    if name == "native_group_norm":
        x, groups, eps = arguments[0], arguments[6], arguments[7]
        first = 1
    else:
        x, groups, _, _, eps = (*arguments[:5], 1e-5)[:5]
        first = 2
    if not watched.keys() <= {first, first + 1}:
        return None
    return _match(AffineRule(1, 1, lambda x: F.group_norm(x, groups, None, None, eps)), watched, (x,), weight=first)


def _normalized_magnitude(row: Tensor) -> Tensor:
    # What is left of equal inputs is rounding; normalised ones are about one.
    return row.abs().clamp(min=1)


def _match(rule: Rule, watched: Mapping[int, Any], saved: tuple[Tensor, ...], *, weight: int) -> Match:
    roles = {p: "weight" if p == weight else "bias" for p in watched}
    return Match(rule, roles, saved if weight in watched else ())
