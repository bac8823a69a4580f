"""Counter-based random numbers: a function of (seed, sample, position, draw), the same on every device.

A result therefore depends on neither chunk size, nor shards, nor what else was computed beside it, and the first M
draws are the same whatever number is asked for. The mixing function is the finaliser of SplitMix64 (Steele, Lea &
Flood 2014), in wrapping 64-bit tensor arithmetic.
"""

import math

import torch
from torch import Tensor

from curvature_engine.speculation import sent


def _signed(value: int) -> int:
    """The 64-bit pattern `value` as the signed integer that torch knows."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
_ALL = 2**64 - 1


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic, so the sign's copies are masked off."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _mix_number(z: int) -> int:
    """`_mix` of one number, as a 64-bit pattern."""
    z &= _ALL
    z = (z ^ (z >> 30)) * _FIRST & _ALL
    z = (z ^ (z >> 27)) * _SECOND & _ALL
    return z ^ (z >> 31)


def uniform(seed: int, samples: Tensor, positions: Tensor, draw: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        seed: any 63-bit integer.
        samples: [N] index of each sample in the whole data set.
        positions: [T] index of each output position.
        draw: index of the draw.
        stream: tells several numbers of one draw apart.

    Returns:
        [N, T] in float64.
    """

    def start(seed: int) -> int:
        return _signed(_mix_number((_mix_number(seed + _GAMMA) + draw * 2 + stream) * _GAMMA + _GAMMA))

    z = _mix(samples.long()[:, None] * _GAMMA + sent(start, seed))
    z = _mix(z + (positions.long()[None, :] + 1) * _GAMMA)
    return _shift_right(z, 11).double() * 2.0**-53


def normal(seed: int, samples: Tensor, positions: Tensor, draw: int) -> Tensor:
    """Standard normal numbers by Box and Muller's transform, [N, T] in float64."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(seed, samples, positions, draw, stream=0)))
    return radius * torch.cos(2.0 * math.pi * uniform(seed, samples, positions, draw, stream=1))
