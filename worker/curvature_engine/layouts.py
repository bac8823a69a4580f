"""Images with their channels last in memory, where that is faster: on CPUs, for most convolutional programs.

Pooling goes over images several times faster so, and convolutions and windows of them a little. Nothing but the
inputs is converted: operators keep what they are given. What an element is called stays as it was, so that only an
operator that asks for the layout could tell, or an edit: what is a view of an image channels first may be a copy of it
channels last.
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.calls import OperatorCall
from curvature_engine.memory_format import channels_last, has_image_layout

LAST = torch.channels_last
_IMAGE_AXES = 4
_LARGE = 2**17
"""Numbers of a weight that is worth keeping in order; not by how many images there are, so that graphs are alike."""
_FORMATS = frozenset((torch.float32,))
"""Of others, kernels gain nothing by it."""
_CONVOLUTIONS = frozenset(("conv2d", "_convolution", "convolution"))
_NORMALISATIONS = frozenset(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"))
_VIEWS = frozenset(("view", "view_as", "_unsafe_view"))
"""What refuses a tensor that it would have to copy."""
_SHUFFLES = frozenset(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"))
"""Reshapings whose schemas do not say so."""


class LayoutShows(Exception):
    """The program would do something else channels first."""


def pays(device: torch.device, operators: Collection[str], *, asks_layout: bool) -> bool:
    """Whether a program with these operators is faster channels last, and cannot tell.

    Batch normalisation's own kernels are slower so by more than convolutions are faster; `batch_norm` goes without.
    """
    names = frozenset(operators)
    gains = device.type == "cpu" and bool(names & _CONVOLUTIONS) and not names & _NORMALISATIONS
    return gains and not tells(names, asks_layout=asks_layout)


def tells(operators: Collection[str], *, asks_layout: bool) -> bool:
    """Whether a program with these operators can tell how its tensors lie."""
    return asks_layout or "as_strided" in operators


class ChannelsLast:
    """The layout of one run.

    Args:
        every: take images and volumes of every format, as somebody asked for.
    """

    def __init__(self, *, every: bool = False) -> None:
        self._every = every
        # Where tensors lie that would share memory channels first.
        self._parted: set[int] = set()

    def take(self, tensor: Tensor) -> Tensor:
        """An input as the program gets it."""
        gains = tensor.dim() == _IMAGE_AXES and tensor.dtype in _FORMATS
        if tensor.requires_grad or not (has_image_layout(tensor) if self._every else gains):
            return tensor
        # Of one channel, only the strides tell.
        last = channels_last(tensor)
        steps, step = [0, 1] + [0] * (last.dim() - 2), last.shape[1]
        for axis in reversed(range(2, last.dim())):
            steps[axis], step = step, step * last.shape[axis]
        steps[0] = step
        return last.as_strided(last.shape, steps, last.storage_offset())

    def invoke(self, call: OperatorCall, arguments: Sequence[Any]) -> Any:
        """Call an operator.

        Raises:
            LayoutShows: where it edits a tensor whose view was copied.
        """
        if call.writes and any(_place(arguments[position]) in self._parted for position in call.writes):
            raise LayoutShows
        source = arguments[0] if arguments else None
        if not isinstance(source, Tensor) or source.is_contiguous():
            return call.invoke(arguments)
        if call.name == "batch_norm" and not self._every and source.dim() == _IMAGE_AXES:
            return _affine(call, arguments)
        if call.name in _CONVOLUTIONS and source.dim() == _IMAGE_AXES:
            arguments = _with_weight_in_order(source, arguments)
        try:
            result = call.invoke(arguments)
        except RuntimeError:
            if call.name not in _VIEWS:
                raise
            result = call.invoke([source.contiguous(), *arguments[1:]])
        if _may_share(call.overload, call.name) and isinstance(result, Tensor):
            places = {_place(source), _place(result)}
            if len(places) > 1:
                self._parted |= places
                if source.requires_grad and has_image_layout(source):
                    # A copy's gradient would come channels first, and pooling go back over it as slowly as without.
                    source.register_hook(_arranged)  # type: ignore[no-untyped-call]
        return result


def _arranged(gradient: Tensor | None) -> Tensor | None:
    """A gradient with its channels last; None leaves it as it is."""
    return None if gradient is None else channels_last(gradient)


def _affine(call: OperatorCall, arguments: Sequence[Any]) -> Any:
    """Batch normalisation with given statistics, as one multiplication and addition.

    Forward and backward take one pass over memory each, where its own backward takes more of channels last.
    """
    x, weight, bias, mean, variance, training, _, eps = arguments[:8]
    if training or mean is None or variance is None or x.dtype not in _FORMATS:
        return call.invoke(arguments)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


def _with_weight_in_order(x: Tensor, arguments: Sequence[Any]) -> Sequence[Any]:
    """A convolution's arguments with a large weight channels last, too.

    Else every pass, forward or back, would bring it into that order anew, which takes longer than few images' products.
    """
    weight = arguments[1]
    if weight.dim() != _IMAGE_AXES or weight.numel() < _LARGE or weight.is_contiguous(memory_format=LAST):
        return arguments
    lying = pages.blank((weight.shape[0], *weight.shape[2:], weight.shape[1]), weight).movedim(-1, 1)
    # Detached, it is no view for autograd, which would write gradients into the whole's zeros.
    return [x, lying.detach().copy_(weight), *arguments[2:]]


@cache
def _may_share(overload: Any, name: str) -> bool:
    """Whether an operator may return a view of its first argument, or that itself."""
    return name in _SHUFFLES or any(each.alias_info is not None for each in overload._schema.returns)


def _place(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
