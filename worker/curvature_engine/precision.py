"""In which number format results are summed, and how formats are called in messages."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name without its module, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")
