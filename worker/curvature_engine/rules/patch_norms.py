"""Squared norms of a convolution's individual gradients from correlations of places, on CPUs.

With x_p the window at position p and g_p the output's gradient there, ‖Σ_p g_p x_pᵀ‖² = Σ_{p,q} ⟨g_p, g_q⟩⟨x_p, x_q⟩
(Goodfellow 2015, extended to windows). Windows overlap, so that ⟨x_p, x_q⟩ is a sum over the kernel's places of
correlations of single places of the image, of which there are far fewer. Nothing is unfolded and no gradient made: a
layer of few positions and many channels takes a small part of its gradients' products.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature_engine.speculation import answer

if TYPE_CHECKING:
    from curvature_engine.rules.convolution import Geometry

_CACHED_BYTES = 2**22
"""Of the correlations of some samples at a time."""
_MOST_BYTES = 2**23
"""Of one sample's correlations: plans do not count them."""
_ADDITION = 30
"""Multiplications and additions of a product that take as long as adding a number to another in a cache."""
_LEAST_GAIN = 0.8
"""Of the products' cost, below which this form is taken."""
_LEAST_SHARE = 2.0**-7
"""Of the sum of absolute values, below which a norm would lose more than seven bits."""


def multiply_adds(channels: tuple[int, int], space: Sequence[int], positions: Sequence[int], taps: int) -> int:
    """What the norm of one sample's gradient costs, in multiplications and additions of a product.

    Args:
        channels: in, out.
        space: of the image.
        positions: of the windows, by axis.
        taps: places of the kernel.
    """
    pairs = prod(positions) ** 2
    return prod(space) ** 2 * channels[0] + pairs * channels[1] + _ADDITION * taps * pairs


def pay(x: Tensor, g: Tensor, taps: int) -> bool:
    """Whether this form is cheaper than gradients, of images x [n, in, *space] and g [n, out, *positions]."""
    if x.device.type != "cpu":
        return False
    inputs, outputs, positions = x.shape[1], g.shape[1], g.shape[2:]
    if max(prod(x.shape[2:]), prod(positions)) ** 2 * x.element_size() > _MOST_BYTES:
        return False
    cost = multiply_adds((inputs, outputs), x.shape[2:], positions, taps)
    return cost <= _LEAST_GAIN * prod(positions) * inputs * outputs * taps


def squared_norms(x: Tensor, g: Tensor, geometry: "Geometry") -> Tensor | None:
    """‖gradient_n‖², [n], of images x [n, in, *space] and g [n, out, *positions]; None where it would not be exact."""
    padded = [b + s + a for b, s, a in zip(geometry.before, x.shape[2:], geometry.after, strict=True)]
    sample_bytes = max(prod(padded), prod(g.shape[2:])) ** 2 * x.element_size()
    size = max(1, _CACHED_BYTES // max(1, sample_bytes))
    found = []
    for first in range(0, len(x), size):
        some = slice(first, first + size)
        terms = _of_gradients(g[some]).mul_(_of_windows(x[some], geometry, g.shape[2:]))
        norms, bound = terms.sum(1), torch.linalg.vector_norm(terms, 1, dim=1)
        if answer((norms < bound * _LEAST_SHARE).any()):
            return None
        found.append(norms)
    return torch.cat(found)


def _of_gradients(g: Tensor) -> Tensor:
    """⟨g_p, g_q⟩, [n, positions²]."""
    flat = g.flatten(2)
    return torch.bmm(flat.mT, flat).flatten(1)


def _of_windows(x: Tensor, geometry: "Geometry", positions: Sequence[int]) -> Tensor:
    """⟨x_p, x_q⟩, [n, positions²]: the sum over the kernel's places of what the windows have there."""
    flat = x.flatten(2)
    pads = [p for pair in zip(reversed(geometry.before), reversed(geometry.after), strict=True) for p in pair]
    pixels = torch.bmm(flat.mT, flat).view(len(x), *x.shape[2:], *x.shape[2:])
    pixels = F.pad(pixels, pads * 2) if any(pads) else pixels
    places = _places(geometry, positions)
    found = pixels[next(places)].clone(memory_format=torch.contiguous_format)
    for place in places:
        found.add_(pixels[place])
    return found.view(len(x), -1)


def _places(geometry: "Geometry", positions: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Per place of the kernel, which pairs of pixels the windows have there."""
    for place in product(*(range(k) for k in geometry.kernel)):
        along = tuple(
            slice(k * d, k * d + s * (p - 1) + 1, s)
            for k, d, s, p in zip(place, geometry.dilation, geometry.stride, positions, strict=True)
        )
        yield (slice(None), *along, *along)
