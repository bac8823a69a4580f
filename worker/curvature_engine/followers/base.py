"""What a follower is: it tells where an operator puts the samples of its arguments."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.sample_strides import Axis, axis_of


class Seen:
    """One operator call as the followers see it.

    Attributes:
        name: the operator's.
        arguments: its arguments, in its schema's order.
        entered: the tracked tensors among them, one for each place where one stands.
    """

    __slots__ = ("N", "_call", "_held", "arguments", "entered", "name")

    def __init__(
        self,
        held: Mapping[int, tuple[Tensor, int]],
        N: int,
        call: OperatorCall,
        arguments: Sequence[Any],
        entered: list[Tensor],
    ) -> None:
        self._held, self.N, self._call = held, N, call
        self.arguments, self.entered = arguments, entered
        self.name = call.name

    def tracks(self, tensor: Any) -> bool:
        """Whether something is a tracked tensor."""
        return id(tensor) in self._held

    def stride(self, tensor: Tensor) -> int:
        """The stride of a tracked tensor."""
        return self._held[id(tensor)][1]

    def axis(self, tensor: Tensor) -> Axis | None:
        """The axis of a tracked tensor's samples; None where they lie on none."""
        return axis_of(tensor.shape, self._held[id(tensor)][1], self.N)

    def alone(self, place: int = 0) -> Axis | None:
        """The axis of one argument, where it is the only one tracked, and stands in that place only."""
        argument = self.arguments[place]
        return self.axis(argument) if len(self.entered) == 1 and self.entered[0] is argument else None

    def shared(self, *, least: int = 1) -> tuple[Axis, int] | None:
        """(axis, its number from the right) where all tracked tensors have it at the same number from the right.

        `least`: the smallest number that will do; the last axis has 1.
        """
        found: tuple[Axis, int] | None = None
        for tensor in self.entered:
            axis = self.axis(tensor)
            if axis is None:
                return None
            place = tensor.dim() - axis.number
            if place < least or (found is not None and (found[1] != place or found[0][1:] != axis[1:])):
                return None
            found = axis, place
        return found

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        place = _places(self._call.overload).get(name)
        return self.arguments[place] if place is not None and place < len(self.arguments) else default

    def axes(self, name: str, count: int, default: Any = None) -> list[int] | None:
        """An argument that names axes, as numbers from 0; None where it names none, or not by number."""
        given = self.named(name, default)
        dims = [given] if isinstance(given, int) else given
        if not isinstance(dims, list | tuple) or not dims or not all(isinstance(d, int) for d in dims):
            return None
        return [d + count if d < 0 else d for d in dims]


@cache
def _places(overload: Any) -> dict[str, int]:
    return {argument.name: place for place, argument in enumerate(overload._schema.arguments)}


Found = list[tuple[Tensor, int]] | None
"""(result, its stride, or 0 if it has nothing tracked in it); None where the samples may be coupled."""
Follower = Callable[[Seen, Any], Found]


def tensors_among(value: Any) -> list[Tensor]:
    """A result's tensors."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else []


def placed(axis: Axis | None, number: int, *results: Any) -> Found:
    """The samples lie on axis `number` of the results, as they lay before."""
    if axis is None or number < 0:
        return None
    found = []
    for result in results:
        if not isinstance(result, Tensor):
            return None
        shape = result.shape
        if number >= len(shape) or shape[number] != axis.size:
            return None
        found.append((result, axis.inner * prod(shape[number + 1 :])))
    return found


def elementwise(seen: Seen, result: Any) -> Found:
    """Every element from the elements at its place, after broadcasting."""
    if not isinstance(result, Tensor):
        return None
    shape = result.shape
    strides = {seen.stride(t) if t.shape == shape else 0 for t in seen.entered}
    if len(strides) == 1 and 0 not in strides:
        return [(result, strides.pop())]
    found = seen.shared()
    return None if found is None else placed(found[0], result.dim() - found[1], result)


def first_alone(seen: Seen, result: Any) -> Found:
    """Elementwise in the first argument; of the others only shape or format matters."""
    first = seen.arguments[0]
    seen.entered = [t for t in seen.entered if t is first]
    return elementwise(seen, result) if seen.entered else [(result, 0)]
