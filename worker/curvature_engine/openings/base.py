"""What an opening is, and the elementary operators in whose terms it is written."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.tape import Tape, shallow_tensors

aten = torch.ops.aten


class Elementary:
    """Calls elementary operators in a fused one's stead, and shows every call to the tape.

    Every operator of an opening goes through `call`: any tensor may be a parameter (an initial state, say), and what
    the tape does not see would be missing from its gradient.
    """

    def __init__(
        self,
        tape: Tape,
        fused: OperatorCall,
        batch: Iterable[Tensor],
        count: Callable[[Any, Sequence[Any]], None] | None = None,
        samples: SampleAxes | None = None,
    ) -> None:
        self._tape, self._fused, self._count = tape, fused, count
        self._samples = SampleAxes() if samples is None else samples
        self._batch = {id(t): t for t in batch}  # kept, so that an id stays its tensor's

    @property
    def name(self) -> str:
        """The fused operator's name."""
        return self._fused.name

    def call(self, overload: Any, *arguments: Any, **options: Any) -> Any:
        """Call an operator; `options` are the arguments after `*` in its schema."""
        call = OperatorCall(
            overload._schema.name.removeprefix("aten::"),
            overload,
            len(arguments),
            tuple(options),
            (),
            (),
            (),
            self._fused.place,
        )
        given = [*arguments, *options.values()]
        result = call.invoke(given)
        static = not any(id(t) in self._batch for t in shallow_tensors(given))
        if self._count is not None:
            self._count(result, given)
        if self._samples.proved:
            self._samples.see(call, given, result)
        self._tape.observe(call, given, result, static=static, samples=self._samples)
        if not static:
            self._batch.update((id(t), t) for t in shallow_tensors([result]))
        return result

    # The operators that openings are written in

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x Wᵀ, plus b."""
        return self._one(aten.linear.default, x, weight, bias)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Products of the last two axes."""
        return self._one(aten.matmul.default, a, b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum a + b."""
        return self._one(aten.add.Tensor, a, b)

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        """Difference a - b."""
        return self._one(aten.sub.Tensor, a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Product of elements a ⊙ b."""
        return self._one(aten.mul.Tensor, a, b)

    def scale(self, a: Tensor, factor: float) -> Tensor:
        """Multiple of a."""
        return self._one(aten.mul.Scalar, a, factor)

    def apply(self, name: str, x: Tensor, *arguments: Any) -> Tensor:
        """An elementwise function such as `tanh`."""
        return self._one(getattr(aten, name).default, x, *arguments)

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        return self._one(aten.softmax.int, x, -1)

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        """Exchange two axes."""
        return self._one(aten.transpose.int, x, a, b)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Other axes, the same elements."""
        return self._one(aten.reshape.default, x, list(shape))

    def select(self, x: Tensor, axis: int, index: int) -> Tensor:
        """One entry of an axis."""
        return self._one(aten.select.int, x, axis, index)

    def narrow(self, x: Tensor, axis: int, start: int, length: int) -> Tensor:
        """A part of an axis; the tensor itself where that is all of it."""
        if start == 0 and length == x.shape[axis]:
            return x
        return self._one(aten.narrow.default, x, axis, start, length)

    def chunk(self, x: Tensor, parts: int, axis: int) -> list[Tensor]:
        """Equal parts of an axis."""
        return list(self.call(aten.chunk.default, x, parts, axis))

    def stack(self, tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Along a new axis."""
        return self._one(aten.stack.default, list(tensors), axis)

    def concatenate(self, tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Along an axis; a single tensor stays itself."""
        return tensors[0] if len(tensors) == 1 else self._one(aten.cat.default, list(tensors), axis)

    def _one(self, overload: Any, *arguments: Any) -> Tensor:
        result: Tensor = self.call(overload, *arguments)
        return result


Opening = Callable[[Elementary, Sequence[Any]], Any]
"""(operators, the fused operator's arguments) → its result; None where this form stays closed."""
