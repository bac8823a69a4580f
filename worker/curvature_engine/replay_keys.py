"""Which analyses are of one kind: all that the host decides an analysis by."""

import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature_engine.execution import tensors_in
from curvature_engine.kernels import choice
from curvature_engine.losses import LossSpec
from curvature_engine.orders import Order
from curvature_engine.program import Inputs, Program
from curvature_engine.speculation import speculates

DEVICES = {"cuda", "cpu"}


class Key(NamedTuple):
    """What two analyses have in common that can be one graph.

    Attributes:
        batch: shapes, layouts and formats, and what is no tensor.
        asked: extensions and loss.
        places: where the parameters lie, and how.
        rest: everything else.
    """

    batch: Hashable
    asked: Hashable
    places: Hashable
    rest: Hashable


def key_of(
    order: Order, spec: LossSpec, parameters: Any, most_bytes: int | None, inputs: Inputs, targets: Tensor
) -> Key | None:
    """An analysis's key; None where that is not known, or nothing can be gained."""
    program = order.program
    if program.device.type not in DEVICES or why_off() is not None or speculates():
        return None
    if order.verify or order.part is not None or order.is_reordered or program.keeps_training:
        return None
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return None  # its casts of weights live as long as the caller's block
    if not spec.is_built_in or not all(_is_built_in(request.extension.accumulator) for request in order.requests):
        return None
    try:
        key = Key(
            _told_batch(inputs, targets),
            (
                tuple((r.label, r.extension.name, _told(r.options)) for r in order.requests),
                (spec.name, _told(spec.options), spec.output, spec.reduction),
            ),
            places_of(program),
            (
                (parameters if isinstance(parameters, str) else tuple(parameters), order.budget, most_bytes),
                (torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), choice.why_off()),
                (torch.get_num_threads(), torch.backends.mkldnn.enabled),
                (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            ),
        )
        hash(key)
    except (TypeError, RuntimeError):  # something of a kind that cannot be told
        return None
    return key


def places_of(program: Program) -> Hashable:
    """Where a program's parameters lie, and how."""
    tensors = (t for p in program.parameters.values() for t in p.tensors)
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)


def why_off() -> str | None:
    """Why no analysis is captured in this process, or None."""
    off = os.environ.get("CURVATURE_GRAPHS", "on").lower() in ("off", "0", "no")
    return "CURVATURE_GRAPHS is off" if off else None


def _told_batch(inputs: Inputs, targets: Tensor) -> Hashable:
    """A batch without its numbers.

    Raises:
        TypeError: copies of its tensors would not be the same to a program.
    """
    told = _told([inputs, targets], tensors=True)
    found = tensors_in([inputs, targets])
    if len({t.untyped_storage().data_ptr() for t in found}) < len(found):
        raise TypeError("tensors share memory")
    return told


def _told(value: Any, *, tensors: bool = False) -> Hashable:
    """Plain data; where `tensors` may be among it, without their numbers.

    Raises:
        TypeError: it is neither.
    """
    kind = type(value)
    if kind is Tensor and tensors:
        return _told_tensor(value)
    if kind is dict:
        return kind, tuple((key, _told(v, tensors=tensors)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return kind, tuple(_told(v, tensors=tensors) for v in value)
    if kind is float:
        return kind, value.hex()  # 0.0 and -0.0 are two
    if value is None or kind in (bool, int, str):
        return kind, value
    raise TypeError(f"{kind.__name__} in a batch or an option")


def _told_tensor(tensor: Tensor) -> Hashable:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise TypeError("a tensor of another kind")
    if not tensor.numel() or not _is_dense(tensor):
        raise TypeError("a tensor whose copy has other strides")
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_dense(tensor: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.dim())
    return tensor.is_contiguous() or (last is not None and tensor.is_contiguous(memory_format=last))


def _is_built_in(accumulator: Any) -> bool:
    """Plug-ins may do on the host what they like."""
    return accumulator is None or accumulator.__module__.startswith("curvature_engine.")


def told_by(found: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie as others do."""
    pairs = zip(found, tensors, strict=True)
    return all((a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) for a, b in pairs)
