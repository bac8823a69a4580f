"""In which number format results are summed, and how formats are called in messages."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name without its module, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def all_finite(x: Tensor) -> bool:
    """Whether no number is infinite or none at all: such a one would show in the sum, which needs no further memory."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
