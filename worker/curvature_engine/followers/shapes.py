"""Followers of operators that move elements about, or pick some."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine.followers.base import Found, Seen, placed, tensors_among
from curvature_engine.sample_strides import Axis


def reshaped(seen: Seen, result: Any) -> Found:
    """The same elements in the same order."""
    source = seen.arguments[0]
    if not isinstance(result, Tensor) or source.numel() != result.numel():
        return None
    return [(result, seen.stride(source) if seen.tracks(source) else 0)]


def transposed(seen: Seen, result: Any) -> Found:
    """Two axes change places."""
    x = seen.arguments[0]
    first, second = seen.axes("dim0", x.dim()), seen.axes("dim1", x.dim())
    if seen.name == "swapaxes":
        first, second = seen.axes("axis0", x.dim()), seen.axes("axis1", x.dim())
    if first is None or second is None:
        return None
    order = list(range(x.dim()))
    order[first[0]], order[second[0]] = second[0], first[0]
    return _ordered(seen, order, result)


def reversed_axes(seen: Seen, result: Any) -> Found:
    """All axes in reverse order."""
    return _ordered(seen, list(reversed(range(seen.arguments[0].dim()))), result)


def last_two(seen: Seen, result: Any) -> Found:
    """The last two axes change places."""
    order = list(range(seen.arguments[0].dim()))
    return _ordered(seen, [*order[:-2], order[-1], order[-2]], result) if len(order) > 1 else None


def permuted(seen: Seen, result: Any) -> Found:
    """The axes in another order."""
    order = seen.axes("dims", seen.arguments[0].dim())
    return None if order is None else _ordered(seen, order, result)


def moved(seen: Seen, result: Any) -> Found:
    """Some axes go to other places; the others close up."""
    count = seen.arguments[0].dim()
    sources, targets = seen.axes("source", count), seen.axes("destination", count)
    if sources is None or targets is None:
        return None
    rest = iter(d for d in range(count) if d not in sources)
    goes = dict(zip(targets, sources, strict=True))
    return _ordered(seen, [goes[d] if d in goes else next(rest) for d in range(count)], result)


def _ordered(seen: Seen, order: Sequence[int], result: Any) -> Found:
    axis = seen.alone()
    return None if axis is None else placed(axis, list(order).index(axis.number), result)


def selected(seen: Seen, result: Any) -> Found:
    """One entry of another axis; or all, one by one."""
    axis, dims = seen.alone(), seen.axes("dim", seen.arguments[0].dim(), 0)
    if axis is None or dims is None or dims[0] == axis.number:
        return None
    return placed(axis, axis.number - (dims[0] < axis.number), *tensors_among(result))


def sliced(seen: Seen, result: Any) -> Found:
    """Some entries of another axis, or all of the samples'."""
    axis, x = seen.alone(), seen.arguments[0]
    dims = seen.axes("dim", x.dim(), 0)
    if axis is None or dims is None:
        return None
    if dims[0] == axis.number:
        whole = isinstance(result, Tensor) and result.shape == x.shape and seen.named("step", 1) == 1
        return [(result, seen.stride(x))] if whole else None
    return placed(axis, axis.number, *tensors_among(result))


def joined(seen: Seen, result: Any) -> Found:
    """Several tensors one after another on another axis, or on a new one."""
    axes = {seen.axis(t) for t in seen.entered}
    axis = axes.pop() if len(axes) == 1 else None
    dims = seen.axes("dim", result.dim(), 0)
    if axis is None or dims is None:
        return None
    if seen.name == "stack":
        return placed(axis, axis.number + (dims[0] <= axis.number), result)
    return None if dims[0] == axis.number else placed(axis, axis.number, result)


def indexed(seen: Seen, result: Any) -> Found:
    """Entries picked by constant whole numbers, along other axes that stand side by side."""
    axis, indices = seen.alone(), seen.arguments[1]
    used = [d for d, index in enumerate(indices) if index is not None]
    if axis is None or not used or used != list(range(used[0], used[-1] + 1)) or axis.number in used:
        return None
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in used):
        return None
    made = max(indices[d].dim() for d in used)
    return placed(axis, axis.number + (made - len(used) if axis.number > used[0] else 0), result)


def repeated(seen: Seen, result: Any) -> Found:
    """Copies side by side, along any axes: along the samples' own, they come round again."""
    axis, x = seen.alone(), seen.arguments[0]
    if axis is None:
        return None
    number = axis.number + result.dim() - x.dim()
    return placed(Axis(number, axis.inner, result.shape[number]), number, result)


def interleaved(seen: Seen, result: Any) -> Found:
    """Each entry of an axis several times, one after another."""
    axis, x, times = seen.alone(), seen.arguments[0], seen.named("repeats")
    dims = seen.axes("dim", x.dim())
    if axis is None or not isinstance(times, int) or times < 1:
        return None
    if dims is None:
        return [(result, seen.stride(x) * times)] if seen.named("dim") is None else None
    times = times if dims[0] == axis.number else 1
    return placed(Axis(axis.number, axis.inner * times, axis.size * times), axis.number, result)


def windows(seen: Seen, result: Any) -> Found:
    """Windows along another axis; what is in them makes a new last axis."""
    axis, dims = seen.alone(), seen.axes("dimension", seen.arguments[0].dim())
    if axis is None or dims is None or dims[0] == axis.number:
        return None
    return placed(axis, axis.number, result)


def _last_axes(seen: Seen, result: Any, count: int) -> Found:
    axis = seen.alone()
    return placed(axis, axis.number, result) if axis and axis.number < seen.arguments[0].dim() - count else None


def shuffled(seen: Seen, result: Any) -> Found:
    """Pixels of the last three axes change places."""
    return _last_axes(seen, result, 3)


def padded(seen: Seen, result: Any) -> Found:
    """The last axes grow, or shrink."""
    return _last_axes(seen, result, len(seen.arguments[1]) // 2)


def triangle(seen: Seen, result: Any) -> Found:
    """Elements beside a diagonal become zero."""
    return [(result, seen.stride(seen.arguments[0]))] if seen.alone() else None
