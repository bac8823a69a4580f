"""What an exported program computes on numbers: sizes, and values read from tensors."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCALARS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{function.__name__}": function
        for function in (
            *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
            *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
            *(operator.neg, operator.pos, operator.and_, operator.or_, operator.lshift, operator.rshift),
        )
    },
    "_operator.pow": lambda a, b: float(a) ** b if b < 0 else a**b if b < 64 else math.pow(a, b),
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.sqrt": math.sqrt,
    "torch.sym_not": operator.not_,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_int": math.trunc,
    "torch.sym_float": float,
    "torch.sym_sqrt": math.sqrt,
    "torch._sym_sqrt": math.sqrt,
    "torch.sym_ite": lambda condition, a, b: a if condition else b,
    "torch.sym_sum": lambda *terms: sum(terms[0]) if len(terms) == 1 and isinstance(terms[0], list) else sum(terms),
}
"""Qualified name → function of Python numbers; a tensor among the arguments is refused."""

QUESTIONS: dict[str, Callable[..., Any]] = {
    "sym_size": lambda t, d: t.shape[d],
    "sym_stride": lambda t, d: t.stride(d),
    "sym_numel": lambda t: t.numel(),
    "sym_storage_offset": lambda t: t.storage_offset(),
}
"""aten operators that ask for a tensor's form."""

READINGS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t.item(),
    "_local_scalar_dense": lambda t: t.item(),
}
"""aten operators that read a tensor's value."""


def unmet(name: str, arguments: list[Any]) -> str | None:
    """What an assertion found wanting; None where it holds.

    Args:
        name: the aten operator's, one of `ASSERTIONS`.
        arguments: complete, by its schema.
    """
    return ASSERTIONS[name](*arguments)


def _asserted(value: Any, message: str = "", *rest: Any) -> str | None:
    return None if bool(value) else message or "an assertion of the model does not hold"


def _in_range(value: Any, least: int | None = None, largest: int | None = None) -> str | None:
    number = value.item() if isinstance(value, Tensor) else value
    if (least is not None and number < least) or (largest is not None and number > largest):
        return f"a value that the model expects from {least} to {largest} is {number}"
    return None


def _like(tensor: Tensor, size: Any = None, stride: Any = None, dtype: Any = None, *rest: Any) -> str | None:
    if size is not None and list(tensor.shape) != list(size):
        return f"a tensor that the model expects of sizes {list(size)} has {list(tensor.shape)}"
    if isinstance(dtype, torch.dtype) and tensor.dtype != dtype:
        return f"a tensor that the model expects of {dtype} is {tensor.dtype}"
    return None


ASSERTIONS: dict[str, Callable[..., str | None]] = {
    "_assert_scalar": _asserted,
    "_assert_async": _asserted,
    "_assert_tensor_metadata": _like,
    "sym_constrain_range": _in_range,
    "sym_constrain_range_for_size": _in_range,
}
"""aten operators that compute nothing → what is wrong, or None. Where tensors lie in memory is no condition here."""
