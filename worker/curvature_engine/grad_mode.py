"""Whatever the caller's mode is, gradients are recorded here."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def with_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """The same, also within the caller's `torch.no_grad()` or `torch.inference_mode()`."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **options)

    return run
