"""What TorchScript asks of a tensor as a Python value, and the casts that it has as methods only."""

from collections.abc import Callable
from typing import Any

import torch


def read_dtype(value: Any) -> torch.dtype | None:
    """TorchScript's integer for a dtype, as a dtype."""
    if value is None or isinstance(value, torch.dtype):
        return value
    return DTYPE_OF[value]


DTYPE_OF: dict[int, torch.dtype] = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 8: torch.complex32, 9: torch.complex64, 10: torch.complex128, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
NUMBER_OF = {dtype: number for number, dtype in DTYPE_OF.items()}


def _size(tensor: torch.Tensor, dim: int | None = None) -> Any:
    return list(tensor.shape) if dim is None else tensor.shape[dim]


TENSOR_QUESTIONS: dict[str, Callable[..., Any]] = {
    "size": _size,
    "dim": lambda t: t.dim(),
    "numel": lambda t: t.numel(),
    "len": len,
    "item": lambda t: t.item(),
    "Int": int,
    "Float": float,
    "Bool": bool,
    "IntImplicit": int,
    "FloatImplicit": float,
    "ScalarImplicit": lambda t: t.item(),
    "is_floating_point": lambda t: t.is_floating_point(),
    "is_complex": lambda t: t.is_complex(),
    "is_nonzero": bool,
    "stride": lambda t, d=None: list(t.stride()) if d is None else t.stride(d),
    "storage_offset": lambda t: t.storage_offset(),
    "is_contiguous": lambda t, *r: t.is_contiguous(),
    "element_size": lambda t: t.element_size(),
    "is_same_size": lambda a, b: a.shape == b.shape,
    "equal": torch.equal,
    "allclose": torch.allclose,
    "is_autocast_enabled": lambda *a: torch.is_autocast_enabled(*a),
    "get_autocast_dtype": lambda d: NUMBER_OF[torch.get_autocast_dtype(d)],
    "is_grad_enabled": torch.is_grad_enabled,
    "__contains__": lambda values, value: value in values,
}


def _to(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """`to` in the forms that take None for device or dtype."""
    for argument in arguments:
        if isinstance(argument, torch.device):
            tensor = tensor.to(argument)
        elif isinstance(argument, torch.Tensor):
            tensor = tensor.to(argument.device, argument.dtype)
        elif isinstance(argument, int) and not isinstance(argument, bool):
            tensor = tensor.to(DTYPE_OF[argument])
    return tensor


METHODS: dict[str, Callable[..., Any]] = {
    "to": _to,
    "cpu": lambda t, *r: t,  # everything lives on the one device that the caller chose
    "cuda": lambda t, *r: t,
    "float": lambda t: t.float(),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int": lambda t: t.int(),
    "long": lambda t: t.long(),
    "bool": lambda t: t.bool(),
}
