"""In which number format results are summed, how formats are called in messages, and how products are made."""

from contextvars import ContextVar

import torch

_CURRENT: ContextVar[str] = ContextVar("precision", default="float32")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name without its module, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def current() -> str:
    """How the analysis in progress multiplies float32 matrices: "float32", "tf32" or "bf16"."""
    return _CURRENT.get()
