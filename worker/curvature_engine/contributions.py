"""One parameter's per-sample gradients for one cotangent, in the form that is cheapest to reduce.

A *contribution* is Σ over the parameter's uses of what each tap's rule gives. It is never written out whole unless
asked for: reductions go over blocks of samples that fit the budget, or use a rule's own shorter form.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from curvature_engine.precision import accumulation_dtype
from curvature_engine.reductions import REDUCTIONS, Assemble, Moments, Outer, Reduction, SumSquared
from curvature_engine.tape import backward

_ACCUMULATED_BYTES = 8
"""At most, of one number of a gradient."""


class Contribution(ABC):
    """Per-sample gradients of one parameter under one cotangent."""

    shape: tuple[int, ...]
    method = "fallback"

    def __init__(self) -> None:
        self._expected: dict[str, int] = {}
        self._found: dict[str, Tensor | Moments] = {}

    @property
    def samples_per_block(self) -> int:
        """How many samples' gradients are written out at a time."""
        return 1

    def multiply_adds(self) -> int:
        """What writing all gradients out costs, beyond the backward passes."""
        return 0

    def working_bytes(self) -> int:
        """What writing out one block takes, with the intermediates of its reduction."""
        return 2 * self.samples_per_block * math.prod(self.shape) * _ACCUMULATED_BYTES

    def norms_multiply_adds(self) -> int:
        """What `squared_norms` costs."""
        return self.multiply_adds()

    def is_reduced(self, reduction: str) -> bool:
        """Whether `sum_squared` or `squared_norms` goes without writing gradients out."""
        return False

    @abstractmethod
    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(first sample, gradients [n, *shape]), block after block, from sample `start` on."""

    @abstractmethod
    def select(self, samples: Tensor) -> "Contribution":
        """The same of some samples [n], in their order; one may come more than once."""

    def outer(self) -> Outer | None:
        """The gradients as outer products, where they are such."""
        return None

    def squares_in_pieces(self) -> tuple[SumSquared, Assemble] | None:
        """Σ_n g_n² in pieces, and what makes one tensor of them; None where it is made in another way, or shared."""
        return None

    def add_squares_to(self, squares: SumSquared) -> bool:
        """Add Σ_n g_n² to what `squares_in_pieces` of another column gave; False where it would give None.

        What lacks memory raises it: a part may have been added.
        """
        return False

    def expect(self, reductions: Mapping[str, int]) -> None:
        """Say which reductions (names of methods) will be asked for, and how often.

        One sweep over the gradients may serve several, and who asks for one gets a tensor of his own.
        """
        self._expected = dict(reductions)

    def _still_expected(self) -> list[str]:
        return [name for name, times in self._expected.items() if times > 0 and name not in self._found]

    def sum_squared(self) -> Tensor:
        """Σ_n g_n², [*shape]."""
        found = self._reduced("sum_squared")
        assert isinstance(found, Tensor)
        return found

    def squared_norms(self) -> Tensor:
        """‖g_n‖², [N]."""
        found = self._reduced("squared_norms")
        assert isinstance(found, Tensor)
        return found

    def total(self) -> Tensor:
        """Σ_n g_n, [*shape]."""
        found = self._reduced("total")
        assert isinstance(found, Tensor)
        return found

    def moments(self) -> Moments:
        """Mean and centred sum of squares, [*shape] each."""
        found = self._reduced("moments")
        assert isinstance(found, Moments)
        return found

    def _reduced(self, name: str) -> Tensor | Moments:
        """A reduction, by one sweep with those that are expected beside it."""
        if name not in self._found:
            found = self._short(name)
            if found is None:
                self._sweep({name, *self._still_expected()})
            else:
                self._found[name] = found
        self._expected[name] = left = self._expected.get(name, 0) - 1
        if left > 0:
            found = self._found[name]
            return Moments(*(t.clone() for t in found)) if isinstance(found, Moments) else found.clone()
        return self._found.pop(name)

    def _short(self, name: str, *, written: bool = False) -> Tensor | Moments | None:
        """A reduction that is made without writing gradients out, where it can be.

        `written`: whether gradients are written out all the same.
        """
        return None

    def _is_dearer(self, name: str) -> bool:
        """Whether a reduction's short form costs more than a look at the gradients, which are written out anyway."""
        return False

    def _sweep(self, names: Collection[str]) -> None:
        """Make reductions, one block of gradients after another."""
        found = self._swept({name: self._reduction(name) for name in names})
        if inexact := [name for name, result in found.items() if result is None]:
            found |= self._swept({name: REDUCTIONS[name]() for name in inexact})
        self._found.update({name: result for name, result in found.items() if result is not None})

    def _reduction(self, name: str) -> Reduction:
        """What makes a reduction, or finds that it takes the usual one."""
        return REDUCTIONS[name]()

    def _swept(self, reductions: Mapping[str, Reduction]) -> dict[str, Tensor | Moments | None]:
        self._show(reductions.values())
        return {name: reduction.result(self._assemble) for name, reduction in reductions.items()}

    def _show(self, reductions: Collection[Reduction]) -> None:
        """Show reductions all gradients."""
        for first, piece, gradients in self._pieces():
            for reduction in reductions:
                reduction.add(first, piece, gradients)

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first sample, number of the piece, [n, *piece]): all of the gradients, block by block."""
        for first, block in self.blocks():
            yield first, 0, block

    def _assemble(self, pieces: list[Tensor]) -> Tensor:
        """What was made of every piece, as a tensor of the parameter's shape."""
        return only(pieces)

    def write_into(self, out: Tensor) -> None:
        """Write all gradients into `out` [N, *shape]; make the expected reductions on the way."""
        reductions: dict[str, Reduction] = {}
        for name in self._still_expected():
            found = None if self._is_dearer(name) else self._short(name, written=True)
            if found is None:
                reductions[name] = REDUCTIONS[name]()
            else:
                self._found[name] = found
        for first, block in self._written_into(out, reduced=bool(reductions)):
            for reduction in reductions.values():
                reduction.add(first, 0, block)
        for name, reduction in reductions.items():
            result = reduction.result(only)
            assert result is not None
            self._found[name] = result

    def scaled(self, factor: float) -> "Contribution":
        """The same times a factor, which goes into what is small where it can."""
        return self if factor == 1.0 else _Scaled(self, factor)

    def _written_into(self, out: Tensor, *, reduced: bool) -> Iterator[tuple[int, Tensor]]:
        """Write block after block; each is told when it is there. `reduced`: they are read again at once."""
        for first, block in self.blocks():
            place = out[first : first + len(block)]
            place.copy_(block)
            yield first, place

    def materialised(self) -> Tensor:
        """All of it, [N, *shape]."""
        blocks = [block for _, block in self.blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


class _Scaled(Contribution):
    """Another's gradients times a factor."""

    def __init__(self, of: Contribution, factor: float) -> None:
        super().__init__()
        self._of, self._factor, self.method, self.shape = of, factor, of.method, of.shape

    def select(self, samples: Tensor) -> Contribution:
        return _Scaled(self._of.select(samples), self._factor)

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        return ((first, block * self._factor) for first, block in self._of.blocks(start))


class Fallback(Contribution):
    """The universal fallback: one backward per sample, with the cotangent restricted to that sample.

    Slow, and right wherever samples are not coupled: it is ordinary autograd on the recorded graph.
    """

    def __init__(
        self, outputs: Tensor, tensors: Sequence[Tensor], cotangent: Tensor, samples: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self._outputs, self._tensors, self._cotangent = outputs, list(tensors), cotangent
        self._samples = range(len(cotangent)) if samples is None else samples
        self.shape = tuple(tensors[0].shape)

    def select(self, samples: Tensor) -> Contribution:
        return Fallback(self._outputs, self._tensors, self._cotangent, [self._samples[n] for n in samples.tolist()])

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        dtype = accumulation_dtype(self._tensors[0].dtype)
        restricted = torch.zeros_like(self._cotangent)
        for place, n in enumerate(self._samples[start:], start):
            restricted[n] = self._cotangent[n]
            gradients = backward(self._outputs, self._tensors, restricted)
            total = torch.zeros(self.shape, dtype=dtype, device=self._tensors[0].device)
            for gradient in gradients:
                if gradient is not None:
                    total += gradient
            restricted[n] = 0  # only now: what was added to the outputs has the cotangent itself as its gradient
            yield place, total[None]


class Materialised(Contribution):
    """Gradients that were written out."""

    def __init__(self, gradients: Tensor) -> None:
        super().__init__()
        self._gradients = gradients
        self.shape = tuple(gradients.shape[1:])

    def select(self, samples: Tensor) -> Contribution:
        return Materialised(self._gradients[samples])

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        if start < len(self._gradients):
            yield start, self._gradients[start:]


class Absent(Contribution):
    """Zero: the parameter does not reach the outputs on this path."""

    method = "absent"

    def __init__(self, like: Tensor, N: int) -> None:
        super().__init__()
        self._like, self._N = like, N
        self.shape = tuple(like.shape)

    def select(self, samples: Tensor) -> Contribution:
        return Absent(self._like, len(samples))

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        dtype = accumulation_dtype(self._like.dtype)
        for n in range(start, self._N):
            yield n, torch.zeros((1, *self.shape), dtype=dtype, device=self._like.device)


def only(pieces: list[Tensor]) -> Tensor:
    """What was made of the one piece there is."""
    (whole,) = pieces
    return whole
