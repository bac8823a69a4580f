"""Tensors of images and of volumes with their channels last in memory, as tensor cores read them."""

import torch
from torch import Tensor

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_image_layout(tensor: Tensor) -> bool:
    """Whether it has a channel axis and two or three of space, as convolutions take them."""
    return tensor.dim() in _FORMATS and tensor.is_floating_point()


def channels_last(tensor: Tensor) -> Tensor:
    """The same numbers; a copy unless they lie so already."""
    return tensor.contiguous(memory_format=_FORMATS[tensor.dim()])
