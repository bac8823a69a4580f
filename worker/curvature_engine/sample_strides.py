"""How a tensor's samples are described: by one number.

A tensor's *stride* says that the element at position p (of the elements in row-major order) belongs to sample
p // stride mod N. Reshaping leaves it as it is. Other operators go by the one *axis* whose index alone says the sample.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The one axis on which a tensor's samples lie: index i belongs to sample i // inner mod N."""

    number: int
    inner: int
    size: int


@lru_cache(maxsize=4096)
def axis_of(shape: tuple[int, ...], stride: int, N: int) -> Axis | None:
    """The axis of a tensor whose index alone says the sample; None where two share in it."""
    after = 1
    for number in reversed(range(len(shape))):
        size = shape[number]
        if stride < after * size:
            inner = stride // after
            return Axis(number, inner, size) if stride % after == 0 and size % (inner * N) == 0 else None
        after *= size
    return None


def spread_numbers(shape: tuple[int, ...], stride: int, N: int, device: torch.device) -> Tensor:
    """As `sample_numbers`, in as little memory as the samples' axis takes where they lie on one."""
    axis = axis_of(shape, stride, N)
    if axis is None:
        return sample_numbers(shape, stride, N, device)
    along = torch.arange(axis.size, device=device).div_(axis.inner, rounding_mode="floor") % N
    return along.view(axis.size, *(1 for _ in shape[axis.number + 1 :])).expand(shape)


def sample_numbers(shape: Sequence[int], stride: int, N: int, device: torch.device) -> Tensor:
    """The sample that each element belongs to: [*shape]."""
    places = torch.arange(prod(shape), device=device)
    return (places.div_(stride, rounding_mode="floor") % N).view(tuple(shape))
