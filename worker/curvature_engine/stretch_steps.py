"""Ways back over single operators for several columns beside each other, by the nodes that autograd made of them.

A way back takes a node and the gradient of its output for k columns, [k, *output], and gives that of its input,
[k, *input], as autograd would of each.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Back = Callable[[Any, Tensor], Tensor]
_LAST = torch.channels_last
_IMAGE_AXES = 4


def _product(node: Any, g: Tensor) -> Tensor:
    found: Tensor = g @ node._saved_mat2.t()
    alpha = getattr(node, "_saved_alpha", 1)
    return found if alpha == 1 else found * alpha


def _reshaped(node: Any, g: Tensor) -> Tensor:
    return g.reshape(len(g), *node._saved_self_sym_sizes)


def _rectified(node: Any, g: Tensor) -> Tensor:
    result = node._saved_result
    found: Tensor = aten.threshold_backward(_lying_like(result, g), result, 0)
    return found


def _convolved(node: Any, g: Tensor) -> Tensor:
    k, x = len(g), node._saved_input
    settings = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed)
    found: Tensor = aten.convolution_backward(
        g.flatten(0, 1),
        _blank(x, k).flatten(0, 1),  # for its shape and layout
        node._saved_weight,
        None,
        *settings,
        node._saved_output_padding,
        node._saved_groups,
        (True, False, False),
    )[0]
    return _parted(found, k)


def _max_pooled(node: Any, g: Tensor) -> Tensor:
    found, pool = _blank(node._saved_self, len(g)), _max_pooling(node)
    # One by one, since the places would have to be copied for each.
    for one, into in zip(_lying_like(node._saved_self, g).unbind(), found.unbind(), strict=True):
        pool(one, into)
    return found


def _max_pooling(node: Any) -> Callable[[Tensor, Tensor], None]:
    """(gradient of the output, place for that of the input), of one column."""
    back = aten.max_pool2d_with_indices_backward.grad_input
    x, places = node._saved_self, node._saved_result1
    window = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
    ceil = node._saved_ceil_mode
    return lambda g, out: back(g, x, *window, ceil, places, grad_input=out)


def pooled_and_rectified(pad: Any, relu: Any) -> Back:
    """The way back over max-pooling, padding if any, and a ReLU, whose nodes follow: column by column.

    What comes out of the pooling, mostly zeros, is so overwritten while it lies in a core's own cache.
    """

    def back(node: Any, g: Tensor) -> Tensor:
        pool, rectify, result = _max_pooling(node), aten.threshold_backward.grad_input, relu._saved_result
        found, passing = _blank(result, len(g)), _blank(node._saved_self, 1)
        cropped = (passing if pad is None else _padded(pad, passing))[0]
        for one, into in zip(_lying_like(node._saved_self, g).unbind(), found.unbind(), strict=True):
            pool(one, passing[0])
            rectify(cropped, result, 0, grad_input=into)
        return found

    return back


def _mean_pooled(node: Any, g: Tensor) -> Tensor:
    x, found = node._saved_self, _blank(node._saved_self, len(g))
    window = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode)
    for one, into in zip(g.unbind(), found.unbind(), strict=True):
        aten.avg_pool2d_backward.grad_input(
            one, x, *window, node._saved_count_include_pad, node._saved_divisor_override, grad_input=into
        )
    return found


def _averaged(node: Any, g: Tensor) -> Tensor:
    sizes = node._saved_self_sym_sizes
    axes = sorted({_signed(axis) % len(sizes) for axis in node._saved_dim})
    if not node._saved_keepdim:
        for axis in axes:
            g = g.unsqueeze(axis + 1)
    mean: Tensor = g / prod(sizes[axis] for axis in axes)
    return mean.expand(len(g), *sizes)


def _padded(node: Any, g: Tensor) -> Tensor:
    """A view: who takes it makes what it makes of it in order."""
    pads = [_signed(pad) for pad in node._saved_pad]
    for number in range(0, len(pads), 2):
        axis, (before, after) = g.dim() - 1 - number // 2, pads[number : number + 2]
        g = g.narrow(axis, before, g.shape[axis] - before - after)
    return g


def _as_it_is(node: Any, g: Tensor) -> Tensor:
    return g


def _blank(x: Tensor, k: int) -> Tensor:
    """Memory for k of a batch x, [k, *x], each in its layout."""
    last = x.dim() == _IMAGE_AXES and x.is_contiguous(memory_format=_LAST)
    shape = (k * len(x), *x.shape[1:])
    blank = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAST if last else torch.contiguous_format)
    return _parted(blank, k)


def _lying_like(x: Tensor, g: Tensor) -> Tensor:
    """The columns' gradients channels last where x is: pooling and convolutions are slower with a mixture."""
    if x.dim() != _IMAGE_AXES or x.is_contiguous() or not x.is_contiguous(memory_format=_LAST):
        return g
    flat = g.flatten(0, 1)
    return _parted(flat.contiguous(memory_format=_LAST), len(g)) if flat.is_contiguous() else g


def _parted(x: Tensor, k: int) -> Tensor:
    """[k·N, …] → [k, N, …], whatever the layout."""
    return x.view(k, len(x) // k, *x.shape[1:])


def _signed(number: int) -> int:
    """A number that autograd's nodes tell without its sign."""
    return number - 2**64 if number >= 2**63 else number


CONVOLUTIONS = frozenset(("ConvolutionBackward0", "ConvolutionBackward1"))
"""The second is what a trace's `_convolution` makes."""
MAX_POOLING, PADDING, RELU = "MaxPool2DWithIndicesBackward0", "ConstantPadNdBackward0", "ReluBackward0"
_MEAN_POOLING = "AvgPool2DBackward0"
PRODUCTS: Mapping[str, int] = {"AddmmBackward0": 1, "MmBackward0": 0}
"""Nodes of products with a weight → which factor is the batch's."""
VECTORS: Mapping[str, Back] = {
    **dict.fromkeys(PRODUCTS, _product),
    RELU: _rectified,
    "TanhBackward0": lambda node, g: aten.tanh_backward(g, node._saved_result),
    "SigmoidBackward0": lambda node, g: aten.sigmoid_backward(g, node._saved_result),
    "SiluBackward0": lambda node, g: aten.silu_backward(g, node._saved_self),
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "ReshapeAliasBackward0": _reshaped,
}
"""Linear layers, and what lies between them.

Not GELU: its kernel on CPUs does not repeat what was saved for all columns.
"""
IMAGES: Mapping[str, Back] = {
    **dict.fromkeys(CONVOLUTIONS, _convolved),
    MAX_POOLING: _max_pooled,
    _MEAN_POOLING: _mean_pooled,
    "MeanBackward1": _averaged,
    PADDING: _padded,
    "CloneBackward0": _as_it_is,
}
"""Layers of images."""


def takes(node: Any) -> bool:
    """Whether a node of `IMAGES` is of the kind that its way back is written for."""
    name = node.name()
    if name == PADDING:
        return all(_signed(pad) >= 0 for pad in node._saved_pad)
    if name in (MAX_POOLING, _MEAN_POOLING):
        return bool(node._saved_self.dim() == _IMAGE_AXES)
    return True


def input_numel(node: Any, numel: int) -> int:
    """How many numbers a node's input has at most, of an output with `numel`."""
    name = node.name()
    if name in PRODUCTS:
        inner, outer = node._saved_mat2.shape
        return numel // int(outer) * int(inner)
    if name in CONVOLUTIONS:
        return int(node._saved_input.numel())
    if name in (MAX_POOLING, _MEAN_POOLING):
        return int(node._saved_self.numel())
    if name == "MeanBackward1":
        return prod(node._saved_self_sym_sizes)
    return numel
