"""A batch as it is given: checked, and brought to the device."""

from typing import Any

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.execution import map_tensors, tensors_in
from curvature_engine.memory_format import has_image_layout
from curvature_engine.precision import dtype_name
from curvature_engine.program import Inputs


def take_batch(
    inputs: Inputs, targets: Tensor, device: torch.device, *, of_images: bool = False
) -> tuple[Inputs, Tensor]:
    """Inputs and targets on the device; with `of_images` there must be images among them.

    Raises:
        EngineError: `invalid_inputs`, `invalid_targets`, `empty_batch`.
    """

    def place(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise EngineError(
                "invalid_inputs",
                f"inputs and targets must be dense tensors; got {tensor.layout} on {tensor.device}, "
                f"{dtype_name(tensor.dtype)}",
                param="inputs",
                remedy="call to_dense() or dequantize()",
            )
        tensor = tensor.clone() if tensor.is_inference() else tensor  # which no graph may hold
        return tensor.detach().to(device)

    inputs, targets = map_tensors(place, inputs), map_tensors(place, targets)
    _check_not_empty(inputs, targets)
    if of_images and not any(has_image_layout(t) for t in tensors_in(inputs)):
        raise EngineError(
            "invalid_option",
            "channels_last is about inputs with a channel axis and two or three of space; there is none",
            param="channels_last",
            remedy="leave channels_last out",
        )
    return inputs, targets


def _check_not_empty(inputs: Any, targets: Any) -> None:
    if not isinstance(targets, Tensor):
        raise EngineError(
            "invalid_targets",
            f"targets must be one tensor; got {type(targets).__name__}",
            param="targets",
            remedy="pass a tensor with one row per sample",
        )
    values = (
        list(inputs.values())
        if isinstance(inputs, dict)
        else list(inputs)
        if isinstance(inputs, tuple | list)
        else [inputs]
    )
    if not values:
        raise EngineError("invalid_inputs", "there are no inputs", param="inputs", remedy="give what forward takes")
    if targets.numel() == 0 or any(isinstance(v, Tensor) and v.numel() == 0 for v in values):
        raise EngineError(
            "empty_batch",
            "the batch is empty: a tensor without elements came",
            param="batch",
            remedy="give at least one sample",
        )
