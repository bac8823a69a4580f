"""Mean and centred sum of squares of samples, as a Triton kernel: one pass over memory.

Each program owns some numbers of every sample, and takes in sample after sample (Welford 1962). torch's reductions of
this kind divide for every number, where one division a sample does.
"""

import triton
import triton.language as tl
from torch import Tensor

from curvature_engine.kernels.choice import on_device_of
from curvature_engine.kernels.squares import TRITON_DTYPES
from curvature_engine.precision import accumulation_dtype

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _spread(
    x: tl.tensor,
    means: tl.tensor,
    spreads: tl.tensor,
    samples: tl.tensor,
    numbers: tl.tensor,
    step: tl.tensor,
    BLOCK: tl.constexpr,
    TOTAL: tl.constexpr,
) -> None:
    """means[i] = Σ_n x[n, i]/N, spreads[i] = Σ_n (x[n, i] − means[i])²."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numbers
    mean = tl.zeros((BLOCK,), dtype=TOTAL)
    spread = tl.zeros((BLOCK,), dtype=TOTAL)
    count = tl.full((1,), 0.0, dtype=TOTAL)
    place = x + i
    for _n in range(0, samples):
        value = tl.load(place, mask=inside, other=0.0).to(TOTAL)
        count += 1.0
        away = value - mean
        mean += away * (1.0 / count)
        spread += away * (value - mean)
        place += step
    tl.store(means + i, mean, mask=inside)
    tl.store(spreads + i, spread, mask=inside)


def mean_and_spread(gradients: Tensor) -> Tensor:
    """Of gradients [n, *p], each contiguous: [2, *p], at least in float32."""
    dtype = accumulation_dtype(gradients.dtype)
    found = gradients.new_empty(2, *gradients.shape[1:], dtype=dtype)
    numbers = found[0].numel()
    with on_device_of(gradients):
        _spread[(-(-numbers // _BLOCK),)](
            gradients,
            found[0],
            found[1],
            len(gradients),
            numbers,
            gradients.stride(0),
            BLOCK=_BLOCK,
            TOTAL=TRITON_DTYPES[dtype],
        )
    return found
