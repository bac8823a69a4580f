"""In which number format results are summed, how formats are called in messages, and how products are made."""

import torch
from torch import Tensor

from curvature_engine.speculation import answer

_MULTIPLYING = ["float32"]
"""Of the analysis in progress; of the whole process, as torch's own settings are, and seen by autograd's threads."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision accumulates in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name without its module, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def all_finite(x: Tensor) -> bool:
    """Whether no number is infinite or none at all: such a one would show in the sum, which needs no further memory."""
    return answer(torch.isfinite(x.sum())) or answer(torch.isfinite(x).all())


def current() -> str:
    """How float32 matrices are multiplied at this moment: "float32", "tf32" or "bf16"."""
    return _MULTIPLYING[-1]


def is_reduced(dtype: torch.dtype) -> bool:
    """Whether numbers of this format may carry the rounding of a coarser one, which products were made in."""
    return dtype == torch.float32 and any(precision != "float32" for precision in _MULTIPLYING)


def begin(precision: str) -> None:
    """Multiply so until `end`."""
    _MULTIPLYING.append(precision)


def end() -> None:
    """Multiply as before."""
    _MULTIPLYING.pop()
