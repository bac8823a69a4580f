"""Whether a fused kernel serves, and which arithmetic it takes: the one place that decides.

A kernel serves where the tensors are float32, float16 or bfloat16 on a CUDA device, Triton can be imported, and the
work is large. The first use of a kernel in a process compiles it (about a second, or a look into Triton's cache on
disk), so small jobs never come here. `benchmarks/gpu.py` measures on both sides of the thresholds.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from curvature_engine.errors import memory_ran_out
from curvature_engine.precision import current
from curvature_engine.speculation import speculates

_LOG = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_UNWRITTEN = 2**24
"""Numbers that the plain form writes and the kernel does not: below, the plain form takes a millisecond at most."""
_MOST_ROWS = {"float32": 128, "tf32": 0, "bf16": 0}
"""Rows that one product of a sample sums over: with more, multiplying takes longer than writing the products, and
library products are the faster multipliers. On an H200 in float32 the kernel takes 0.70, 0.86, 0.88 and 1.15 of the
plain form's time with 16, 64, 128 and 1024 rows; in TF32 it never pays, and cuts off what the library rounds."""
_LEAST_NUMBERS = 2**18
"""Of one sample's gradient from which a program for each thousand of them keeps a GPU busy."""
_NARROWEST = 16
_INDEXED = 2**31

_off: list[str] = []
"""Why kernels are off in this process, if they are."""


def switch_off(reason: str) -> None:
    """Use plain forms only, in this process from now on."""
    _off.append(reason)


def why_off() -> str | None:
    """Why no kernel is used on any device, or None."""
    if _off:
        return _off[0]
    if os.environ.get("CURVATURE_KERNELS", "on").lower() in ("off", "0", "no"):
        return "CURVATURE_KERNELS is off"
    return None if _has_triton() else "Triton is not installed"


def pays_for_squares(left: Tensor, right: Tensor, numbers: int | None = None) -> bool:
    """Whether Σ_n (Σ_r l rᵀ)² of left [n, rows, a] and right [n, rows, b] is for the kernel.

    `numbers`: of the whole parameter, where that [a, b] is one of several pieces of it (None: the only one). What is
    not written is counted for all of them together.
    """
    n, rows, a = left.shape
    b = right.shape[2]
    return (
        is_for_kernels(left)
        and left.dtype == right.dtype
        and min(a, b) >= _NARROWEST
        and rows <= _MOST_ROWS[current()]
        and n * (a * b if numbers is None else numbers) >= _LEAST_UNWRITTEN
        and max(_extent(left[0]), _extent(right[0]), a * b) < _INDEXED
    )


def pays_for_patches(x: Tensor, rows: int, width: int, groups: int) -> bool:
    """Whether Σ x xᵀ of patches, `rows` in all with `width` numbers in each group, is for the kernel."""
    return (
        is_for_kernels(x)
        and width >= _NARROWEST
        and rows * width * groups >= _LEAST_UNWRITTEN
        and max(rows, width * width, _extent(x[0])) < _INDEXED
    )


def pays_for_spread(gradients: Tensor) -> bool:
    """Whether mean and spread of gradients [n, *p] are for the kernel."""
    return (
        is_for_kernels(gradients)
        and gradients.numel() >= _LEAST_UNWRITTEN
        and _LEAST_NUMBERS <= gradients[0].numel() < _INDEXED
        and gradients[0].is_contiguous()
    )


def guarded(kernel: Callable[[], Tensor]) -> Tensor | None:
    """What a kernel gives; None where it cannot be had here, and then never again in this process."""
    try:
        return kernel()
    except Exception as error:
        if memory_ran_out(error) or speculates():  # a run that may fail without meaning anything
            raise
        # No compiler, no permission to start one, a GPU or driver that Triton does not know: the plain form serves.
        reason = f"a kernel failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        _LOG.warning("%s; plain forms are used from now on", reason)
        switch_off(reason)
        return None


def is_for_kernels(x: Tensor) -> bool:
    """Whether a tensor's device and dtype are those of kernels, and there are any."""
    return x.device.type == "cuda" and x.dtype in _DTYPES and x.numel() > 0 and why_off() is None


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Where a kernel is to be launched: Triton goes by the current device, not by its arguments'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _extent(x: Tensor) -> int:
    """The distance of the last element from the first."""
    return sum((size - 1) * abs(step) for size, step in zip(x.shape, x.stride(), strict=True))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
