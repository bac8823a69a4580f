"""Where the samples lie in every tensor of a forward pass, proved from the operators.

The probe *asks* which row belongs to which sample, and has to ask again for every batch, for another batch may couple
what this one does not. Of most operators it is known for every batch: a convolution keeps its images apart whatever is
in them. Where a whole forward pass consists of such operators, its rows are proved, and nothing need be asked.

A tensor's samples are described by one number, the *stride*: the element at position p (of the elements in row-major
order) belongs to sample p // stride mod N. Reshaping leaves it as it is; other operators are asked for the axis on
which the samples lie and keep it, or move it, or are not on the list, and the proof ends there. By induction, all that
has to do with sample n in any tensor was made of what has to do with sample n in the inputs.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.operators import ELEMENTWISE

_LEAST_SAMPLES = 2


class Axis(NamedTuple):
    """The one axis on which a tensor's samples lie: index i belongs to sample i // inner mod N."""

    number: int
    inner: int
    size: int


class SampleAxes:
    """Follows the samples through one forward pass.

    Attributes:
        proved: whether every operator so far keeps them apart.
    """

    def __init__(self) -> None:
        self.N = 0
        self.proved = False
        # The tensors are held, so that their ids stay theirs.
        self._strides: dict[int, tuple[Tensor, int]] = {}
        self._constant: dict[int, Tensor] = {}

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Take the inputs' first axes for the samples'; the outputs show whether they are."""
        tensors = list(inputs)
        if not tensors or any(t.dim() == 0 or t.shape[0] != tensors[0].shape[0] for t in tensors):
            return
        self.N = tensors[0].shape[0]
        if self.N < _LEAST_SAMPLES or any(t.numel() == 0 for t in tensors):
            return
        self.proved = True
        for tensor in tensors:
            self._strides[id(tensor)] = tensor, tensor.numel() // self.N

    def stop(self) -> None:
        """Give the proof up."""
        self.proved = False
        self._strides.clear()
        self._constant.clear()

    def see(self, call: OperatorCall, arguments: Sequence[Any], of_batch: Sequence[bool], result: Any) -> None:
        """Follow the samples through one operator that the batch enters.

        Args:
            call: the operator.
            arguments: its arguments.
            of_batch: which of them depend on the batch.
            result: what it gave.
        """
        name = call.name
        if call.writes:
            name = name.removesuffix("_")
            edited = arguments[0]
            if call.writes != (0,) or id(edited) not in self._strides:
                self.stop()
                return
        entered: list[Tensor] = []
        for argument, depends in zip(arguments, of_batch, strict=True):
            if depends:
                entered.extend(_tensors(argument))
        if entered and all(id(t) in self._constant for t in entered):
            self._constant.update((id(t), t) for t in _tensors(result))
            return
        entered = [t for t in entered if id(t) not in self._constant]
        if any(id(t) not in self._strides for t in entered):
            self.stop()
            return
        follow = _FOLLOWERS.get(name)
        if follow is None and torch.Tag.pointwise in call.overload.tags:
            follow = _elementwise
        found = None if follow is None else follow(_Seen(self, call, arguments, entered), result)
        if found is None:
            self.stop()
            return
        for tensor, stride in found:
            if stride:
                self._strides[id(tensor)] = tensor, stride
            else:
                self._constant[id(tensor)] = tensor

    def stride(self, tensor: Tensor) -> int | None:
        """A tensor's stride, while there is a proof."""
        found = self._strides.get(id(tensor))
        return None if found is None else found[1]

    def close(self, outputs: Iterable[Tensor]) -> None:
        """Let go of all tensors but the outputs."""
        ids = {id(t) for t in outputs}
        self._strides = {place: held for place, held in self._strides.items() if place in ids}
        self._constant.clear()

    def keeps_rows(self, outputs: Tensor) -> bool:
        """Whether each row of the outputs is proved to be of the sample with its number."""
        if not self.proved or outputs.dim() == 0 or outputs.shape[0] != self.N:
            return False
        return self.stride(outputs) == outputs.numel() // self.N


def sample_numbers(shape: Sequence[int], stride: int, N: int, device: torch.device) -> Tensor:
    """The sample that each element belongs to: [*shape]."""
    places = torch.arange(prod(shape), device=device)
    return (places.div_(stride, rounding_mode="floor") % N).view(tuple(shape))


class _Seen:
    """One operator call as the followers see it."""

    def __init__(self, axes: SampleAxes, call: OperatorCall, arguments: Sequence[Any], entered: list[Tensor]) -> None:
        self._axes, self._call = axes, call
        self.arguments, self.entered = arguments, entered
        self.name = call.name

    def stride(self, tensor: Tensor) -> int:
        found = self._axes.stride(tensor)
        assert found is not None
        return found

    def axis(self, tensor: Any) -> Axis | None:
        """The axis of a tensor's samples; None where they lie on none, or it has nothing to do with the batch."""
        stride = self._axes.stride(tensor) if isinstance(tensor, Tensor) else None
        return None if stride is None else axis_of(tensor.shape, stride, self._axes.N)

    def alone(self) -> Axis | None:
        """The axis of the first argument, where no other has to do with the batch."""
        first = self.arguments[0]
        return self.axis(first) if all(t is first for t in self.entered) else None

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        for argument, value in zip(self._call.overload._schema.arguments, self.arguments, strict=False):
            if argument.name == name:
                return value
        return default


def axis_of(shape: Sequence[int], stride: int, N: int) -> Axis | None:
    """The axis of a tensor whose index alone says the sample; None where two share in it."""
    after = 1
    for number in reversed(range(len(shape))):
        size = shape[number]
        if stride < after * size:
            inner = stride // after
            return Axis(number, inner, size) if stride % after == 0 and size % (inner * N) == 0 else None
        after *= size
    return None


Found = list[tuple[Tensor, int]] | None
"""(tensor, its stride, or 0 if nothing of the batch is in it); None where the samples may be coupled."""
Follower = Callable[[_Seen, Any], Found]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else []


def _placed(axis: Axis | None, number: int, *results: Any) -> Found:
    """The samples lie on axis `number` of the results, as they lay before."""
    if axis is None:
        return None
    found = []
    for result in results:
        if not isinstance(result, Tensor) or number >= result.dim() or result.shape[number] != axis.size:
            return None
        found.append((result, axis.inner * prod(result.shape[number + 1 :])))
    return found


def _dims(given: Any, count: int) -> list[int]:
    """Axes as numbers from 0."""
    dims = [given] if isinstance(given, int) else list(given)
    return [d + count if d < 0 else d for d in dims]


def _elementwise(seen: _Seen, result: Any) -> Found:
    """Every element from the elements at its place, after broadcasting."""
    if not isinstance(result, Tensor) or not seen.entered:
        return None
    strides = {seen.stride(t) for t in seen.entered}
    if len(strides) == 1 and all(t.shape == result.shape for t in seen.entered):
        return [(result, strides.pop())]
    places = set()
    for tensor in seen.entered:
        axis = seen.axis(tensor)
        if axis is None:
            return None
        places.add((axis, tensor.dim() - axis.number))
    if len({(axis.inner, axis.size, from_right) for axis, from_right in places}) != 1:
        return None
    axis, from_right = places.pop()
    return _placed(axis, result.dim() - from_right, result)


def _where(seen: _Seen, result: Any) -> Found:
    return _elementwise(seen, result) if len(seen.arguments) > 2 else None


def _first_alone(seen: _Seen, result: Any) -> Found:
    """Elementwise in the first argument; of the others only shape or format matters."""
    seen.entered = [t for t in seen.entered if t is seen.arguments[0]]
    return _elementwise(seen, result)


def _reshaped(seen: _Seen, result: Any) -> Found:
    """The same elements in the same order."""
    source = seen.arguments[0]
    if not isinstance(result, Tensor) or source.numel() != result.numel():
        return None
    return [(result, seen.stride(source))] if any(t is source for t in seen.entered) else None


def _like(seen: _Seen, result: Any) -> Found:
    """Made of a shape alone."""
    return [(t, 0) for t in _tensors(result)]


def _images(seen: _Seen, result: Any) -> Found:
    """Operators that treat the entries of the first axis alike and apart."""
    axis = seen.alone()
    return _placed(axis, 0, result) if axis is not None and axis.number == 0 else None


def _first_of_several(seen: _Seen, result: Any) -> Found:
    """As `_images`; the second and further outputs are statistics."""
    return _images(seen, result[0]) if isinstance(result, list | tuple) else None


def _convolved(seen: _Seen, result: Any) -> Found:
    # An image without a batch axis has its channels first.
    return _images(seen, result) if seen.arguments[0].dim() == seen.arguments[1].dim() else None


def _linear(seen: _Seen, result: Any) -> Found:
    axis, x = seen.alone(), seen.arguments[0]
    return _placed(axis, axis.number, result) if axis is not None and axis.number < x.dim() - 1 else None


def _addmm(seen: _Seen, result: Any) -> Found:
    x = seen.arguments[1]
    if any(t is not x for t in seen.entered):
        return None
    axis = seen.axis(x)
    return _placed(axis, 0, result) if axis is not None and axis.number == 0 else None


def _product(seen: _Seen, a: Tensor, b: Tensor, result: Tensor) -> Found:
    """A product of matrices [.., i, k] and [.., k, j]: not over samples, and of the same ones."""
    if a.dim() < 2 or b.dim() < 2:
        return None
    of_a, of_b = seen.axis(a), seen.axis(b)
    entered = [t for t in (a, b) if any(t is e for e in seen.entered)]
    places = []
    for tensor, axis, contracted in ((a, of_a, 1), (b, of_b, 2)):
        if not any(tensor is e for e in entered):
            continue
        if axis is None or tensor.dim() - axis.number == contracted:
            return None
        places.append((axis.inner, axis.size, tensor.dim() - axis.number))
    if not places or len(set(places)) != 1 or (len(places) == 2 and places[0][2] < 3):
        return None
    axis = of_a if of_a is not None else of_b
    return _placed(axis, result.dim() - places[0][2], result)


def _matmul(seen: _Seen, result: Any) -> Found:
    return _product(seen, seen.arguments[0], seen.arguments[1], result)


def _baddbmm(seen: _Seen, result: Any) -> Found:
    added, a, b = seen.arguments[:3]
    found = _product(seen, a, b, result)
    if found is None or not any(t is added for t in seen.entered):
        return found
    axis = seen.axis(added)
    if axis is None:
        return None
    aligned = _placed(axis, result.dim() - added.dim() + axis.number, result)
    return found if aligned is not None and aligned[0][1] == found[0][1] else None


def _attention(seen: _Seen, result: Any) -> Found:
    """Every sample's queries, keys and values by themselves."""
    places = set()
    for tensor in seen.entered:
        axis = seen.axis(tensor)
        if axis is None or tensor.dim() - axis.number < 3:
            return None
        places.add((axis.inner, axis.size, tensor.dim() - axis.number))
    if len(places) != 1:
        return None
    ((inner, size, from_right),) = places
    number = result.dim() - from_right
    return _placed(Axis(number, inner, size), number, result)


_SPACE = re.compile(r"([123])d")


def _space(seen: _Seen, result: Any) -> Found:
    """Pooling and resizing: over the last axes, as many as the name says."""
    named = _SPACE.search(seen.name)
    axis, x = seen.alone(), seen.arguments[0]
    if named is None or axis is None or axis.number >= x.dim() - int(named[1]):
        return None
    return _placed(axis, axis.number, *_tensors(result))


def _padded(seen: _Seen, result: Any) -> Found:
    axis, x = seen.alone(), seen.arguments[0]
    if axis is None or axis.number >= x.dim() - len(seen.arguments[1]) // 2:
        return None
    return _placed(axis, axis.number, result)


def _layer_norm(seen: _Seen, result: Any) -> Found:
    axis, x = seen.alone(), seen.arguments[0]
    if axis is None or axis.number >= x.dim() - len(seen.arguments[1]):
        return None
    return _placed(axis, axis.number, result[0] if isinstance(result, list | tuple) else result)


def _along(seen: _Seen, result: Any) -> Found:
    """Along one axis, which is not the samples'."""
    axis, x, dim = seen.alone(), seen.arguments[0], seen.named("dim")
    if axis is None or dim is None or axis.number in _dims(dim, x.dim()):
        return None
    return _placed(axis, axis.number, *_tensors(result))


def _reduced(seen: _Seen, result: Any) -> Found:
    """Over some axes, none of them the samples'."""
    axis, x, dim = seen.alone(), seen.arguments[0], seen.named("dim")
    if axis is None or dim is None or dim == []:
        return None
    dims = _dims(dim, x.dim())
    if axis.number in dims:
        return None
    number = axis.number if seen.named("keepdim", False) else axis.number - sum(d < axis.number for d in dims)
    return _placed(axis, number, *_tensors(result))


def _transposed(seen: _Seen, result: Any) -> Found:
    x = seen.arguments[0]
    pair = (0, 1) if seen.name == "t" else seen.arguments[1:3]
    if seen.name == "t" and x.dim() < 2:
        return _reshaped(seen, result)
    first, second = _dims(pair, x.dim())
    order = list(range(x.dim()))
    order[first], order[second] = second, first
    return _ordered(seen, order, result)


def _permuted(seen: _Seen, result: Any) -> Found:
    return _ordered(seen, _dims(seen.arguments[1], seen.arguments[0].dim()), result)


def _ordered(seen: _Seen, order: Sequence[int], result: Any) -> Found:
    axis = seen.alone()
    return None if axis is None else _placed(axis, list(order).index(axis.number), result)


def _selected(seen: _Seen, result: Any) -> Found:
    """One entry of another axis; or all, one by one."""
    axis, x = seen.alone(), seen.arguments[0]
    dim = _dims(seen.named("dim", 0), x.dim())[0]
    if axis is None or dim == axis.number:
        return None
    return _placed(axis, axis.number - (dim < axis.number), *_tensors(result))


def _sliced(seen: _Seen, result: Any) -> Found:
    """Some entries of another axis, or all of the samples'."""
    axis, x = seen.alone(), seen.arguments[0]
    dim = _dims(seen.named("dim", 0), x.dim())[0]
    if axis is None:
        return None
    if dim == axis.number:
        whole = isinstance(result, Tensor) and result.shape == x.shape and seen.named("step", 1) == 1
        return [(result, seen.stride(x))] if whole else None
    return _placed(axis, axis.number, *_tensors(result))


def _joined(seen: _Seen, result: Any) -> Found:
    """Several tensors one after another on another axis, or on a new one."""
    places = {seen.axis(t) for t in seen.entered}
    if len(places) != 1 or None in places:
        return None
    axis = places.pop()
    assert axis is not None
    dim = _dims(seen.named("dim", 0), result.dim())[0]
    if seen.name == "stack":
        return _placed(axis, axis.number + (dim <= axis.number), result)
    return None if dim == axis.number else _placed(axis, axis.number, result)


def _embedding(seen: _Seen, result: Any) -> Found:
    indices = seen.arguments[1]
    if any(t is not indices for t in seen.entered) or not indices.numel():
        return None
    return [(result, seen.stride(indices) * (result.numel() // indices.numel()))]


def _list(text: str) -> list[str]:
    return text.split()


_FOLLOWERS: dict[str, Follower] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "where": _where,
    "copy": _elementwise,
    **dict.fromkeys(_list("dropout alpha_dropout feature_dropout feature_alpha_dropout"), _first_alone),
    **dict.fromkeys(_list("expand expand_as broadcast_to"), _first_alone),
    **dict.fromkeys(
        _list(
            "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as contiguous clone alias detach "
            "_unsafe_view to _to_copy type_as lift_fresh lift_fresh_copy"
        ),
        _reshaped,
    ),
    **dict.fromkeys(_list("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"), _like),
    **dict.fromkeys(
        _list("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution"),
        _convolved,
    ),
    **dict.fromkeys(_list("batch_norm group_norm"), _images),
    **dict.fromkeys(
        _list("native_batch_norm _native_batch_norm_legit_no_training native_group_norm"), _first_of_several
    ),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(_list("matmul mm bmm"), _matmul),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        _list(
            "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
            "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
            "max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
            "upsample_bicubic2d upsample_trilinear3d"
        ),
        _space,
    ),
    **dict.fromkeys(
        _list(
            "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
            "replication_pad2d replication_pad3d"
        ),
        _padded,
    ),
    **dict.fromkeys(_list("layer_norm native_layer_norm rms_norm"), _layer_norm),
    **dict.fromkeys(
        _list("softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp glu index_select"), _along
    ),
    **dict.fromkeys(
        _list("sum mean prod var std amax amin max min argmax argmin logsumexp any all linalg_vector_norm"), _reduced
    ),
    **dict.fromkeys(_list("transpose swapaxes swapdims t"), _transposed),
    "permute": _permuted,
    **dict.fromkeys(_list("select unbind"), _selected),
    **dict.fromkeys(
        _list(
            "slice narrow chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes"
        ),
        _sliced,
    ),
    **dict.fromkeys(_list("cat concat concatenate stack"), _joined),
    "embedding": _embedding,
}
