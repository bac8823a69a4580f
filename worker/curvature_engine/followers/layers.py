"""Followers of layers: products, convolutions, attention, pooling, norms."""

import re
from typing import Any

from torch import Tensor

from curvature_engine.followers.base import Found, Seen, elementwise, placed, tensors_among
from curvature_engine.sample_strides import Axis


def images(seen: Seen, result: Any) -> Found:
    """Operators that treat the entries of the first axis alike and apart."""
    axis = seen.alone()
    return placed(axis, 0, result) if axis is not None and axis.number == 0 else None


def first_of_several(seen: Seen, result: Any) -> Found:
    """As `images`; the second and further outputs are statistics."""
    return images(seen, result[0]) if isinstance(result, list | tuple) else None


def convolved(seen: Seen, result: Any) -> Found:
    """Convolutions. An image without a batch axis has its channels first."""
    return images(seen, result) if seen.arguments[0].dim() == seen.arguments[1].dim() else None


def patched(seen: Seen, result: Any) -> Found:
    """Images to columns of patches, and back; without a batch axis they have one axis less."""
    x = seen.arguments[0]
    return images(seen, result) if x.dim() == (4 if seen.name == "im2col" else 3) else None


def instance_norm(seen: Seen, result: Any) -> Found:
    """Statistics of each channel of each image; kept ones must not be written."""
    keeps = seen.named("running_mean") is not None and seen.named("use_input_stats")
    return None if keeps else images(seen, result)


def norm_of_channels(seen: Seen, result: Any) -> Found:
    """What `instance_norm` becomes: statistics of each entry of the second axis."""
    axis = seen.alone()
    if axis is None or axis.number != 1 or not isinstance(result, list | tuple):
        return None
    return placed(axis, 1, result[0])


def linear(seen: Seen, result: Any) -> Found:
    """Products along the last axis."""
    axis = seen.alone()
    return placed(axis, axis.number, result) if axis and axis.number < seen.arguments[0].dim() - 1 else None


def addmm(seen: Seen, result: Any) -> Found:
    """A constant, and a product of rows with a constant matrix."""
    axis = seen.alone(1)
    return placed(axis, 0, result) if axis is not None and axis.number == 0 else None


def matmul(seen: Seen, result: Any) -> Found:
    """Products of matrices, one for each index of the axes before."""
    return _product(seen, seen.arguments[0], seen.arguments[1], result)


def _product(seen: Seen, a: Tensor, b: Tensor, result: Tensor) -> Found:
    """A product of matrices [.., i, k] and [.., k, j]: not over samples, and of the same ones."""
    if b.dim() == 1 and not seen.tracks(b) and seen.tracks(a):
        axis = seen.axis(a)
        return placed(axis, axis.number, result) if axis and axis.number < a.dim() - 1 else None
    if a.dim() < 2 or b.dim() < 2:
        return None
    places: list[tuple[Axis, int]] = []
    for tensor, contracted in ((a, 1), (b, 2)):
        if not seen.tracks(tensor):
            continue
        axis = seen.axis(tensor)
        if axis is None or tensor.dim() - axis.number == contracted:
            return None
        places.append((axis, tensor.dim() - axis.number))
    if not places:
        return None
    (axis, from_right), *others = places
    for other, place in others:
        if place != from_right or other[1:] != axis[1:]:  # rows of one and columns of the other are at 2 and at 1
            return None
    return placed(axis, result.dim() - from_right, result)


def baddbmm(seen: Seen, result: Any) -> Found:
    """A product of matrices, and what is added to it."""
    added, a, b = seen.arguments[:3]
    if not seen.tracks(added):
        return _product(seen, a, b, result)
    axis = seen.axis(added)
    if axis is None:
        return None
    aligned = placed(axis, result.dim() - added.dim() + axis.number, result)
    if not seen.tracks(a) and not seen.tracks(b):
        return aligned
    found = _product(seen, a, b, result)
    return found if found is not None and aligned is not None and aligned[0][1] == found[0][1] else None


def attention(seen: Seen, result: Any) -> Found:
    """Every sample's queries, keys and values by themselves."""
    found = seen.shared(least=3)
    return None if found is None else placed(found[0], result.dim() - found[1], result)


def bilinear(seen: Seen, result: Any) -> Found:
    """Products along the last axes of two tensors that have the others in common."""
    found = seen.shared(least=2)
    if found is None or not all(any(t is x for x in seen.arguments[:2]) for t in seen.entered):
        return None
    constant = not any(seen.tracks(t) for t in seen.arguments[2:])
    return placed(found[0], found[0].number, result) if constant else None


def einsum(seen: Seen, result: Any) -> Found:
    """Sums of products: the samples' letter is the same everywhere, and stays."""
    left, arrow, right = seen.arguments[0].replace(" ", "").partition("->")
    terms, operands = left.split(","), seen.arguments[1]
    if not arrow or len(terms) != len(operands):
        return None
    # The axes that an ellipsis stands for get letters of their own; they line up from the right.
    sizes = [t.dim() - len(term.replace("...", "")) for term, t in zip(terms, operands, strict=True)]
    unnamed = "".join(chr(0x100 + i) for i in range(max(sizes)))
    found: tuple[str, Axis] | None = None
    for term, size, tensor in zip(terms, sizes, operands, strict=True):
        if not seen.tracks(tensor):
            continue
        letters = term.replace("...", unnamed[len(unnamed) - size :])
        axis = seen.axis(tensor)
        if axis is None or len(letters) != tensor.dim() or letters.count(letters[axis.number]) > 1:
            return None
        letter = letters[axis.number]
        if found is not None and (found[0] != letter or found[1][1:] != axis[1:]):
            return None
        found = letter, axis
    return None if found is None else placed(found[1], right.replace("...", unnamed).find(found[0]), result)


_SPACE = re.compile(r"([123])d")


def space(seen: Seen, result: Any) -> Found:
    """Pooling, resizing, padding: over the last axes, as many as the name says."""
    named = _SPACE.search(seen.name)
    axis, x = seen.alone(), seen.arguments[0]
    if named is None or axis is None or axis.number >= x.dim() - int(named[1]):
        return None
    return placed(axis, axis.number, *tensors_among(result))


def layer_norm(seen: Seen, result: Any) -> Found:
    """Statistics over the last axes."""
    axis, x = seen.alone(), seen.arguments[0]
    if axis is None or axis.number >= x.dim() - len(seen.arguments[1]):
        return None
    return placed(axis, axis.number, *tensors_among(result))


def along(seen: Seen, result: Any) -> Found:
    """Along some axes, which are not the samples'."""
    axis, x = seen.alone(), seen.arguments[0]
    dims = seen.axes("dim", x.dim()) or seen.axes("dims", x.dim())
    if axis is None or dims is None or axis.number in dims:
        return None
    return placed(axis, axis.number, *tensors_among(result))


def reduced(seen: Seen, result: Any) -> Found:
    """Over some axes, none of them the samples'."""
    axis = seen.alone()
    dims = seen.axes("dim", seen.arguments[0].dim())
    if axis is None or dims is None or axis.number in dims:
        return None
    number = axis.number if seen.named("keepdim", False) else axis.number - sum(d < axis.number for d in dims)
    return placed(axis, number, *tensors_among(result))


def extreme(seen: Seen, result: Any) -> Found:
    """`max` and `min`: over an axis, or of two tensors."""
    return reduced(seen, result) if seen.named("other") is None else elementwise(seen, result)


def where(seen: Seen, result: Any) -> Found:
    """Chosen element by element; without alternatives it asks where the condition holds."""
    return elementwise(seen, result) if len(seen.arguments) > 2 else None


def looked_up(seen: Seen, result: Any) -> Found:
    """A vector for every index: from a table, or one-hot."""
    place = 1 if seen.name == "embedding" else 0
    indices = seen.arguments[place]
    if len(seen.entered) != 1 or seen.entered[0] is not indices or not indices.numel():
        return None
    return [(result, seen.stride(indices) * (result.numel() // indices.numel()))]
