"""One parameter's per-sample gradients for one cotangent, in the form that is cheapest to reduce.

A *contribution* is Σ over the parameter's uses of what each tap's rule gives. It is never written out whole unless
asked for: reductions go over blocks of samples that fit the budget, or use a rule's own shorter form.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature_engine.errors import memory_ran_out
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Attribution
from curvature_engine.reductions import REDUCTIONS, Moments, Outer, Reduction
from curvature_engine.rules import Rule
from curvature_engine.tape import Tap, Use, backward
from curvature_engine.unfolded import Unfolded
from curvature_engine.watched import Derivation, pull_back


class Relief:
    """Counts how often blocks were halved because memory ran out: later ones begin at that size."""

    def __init__(self) -> None:
        self.halvings = 0


_ACCUMULATED_BYTES = 8
"""At most, of one number of a gradient."""
_CACHED_BYTES = 2**24
"""Of gradients that are reduced while they lie in a CPU's cache."""
_RESIDENT_BYTES = 2**28
"""Of those that keep an accelerator busy."""


def _block_bytes(device: torch.device) -> int:
    return _CACHED_BYTES if device.type == "cpu" else _RESIDENT_BYTES


class Contribution(ABC):
    """Per-sample gradients of one parameter under one cotangent."""

    shape: tuple[int, ...]
    method = "fallback"

    def __init__(self) -> None:
        self._expected = Counter[str]()
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

    def expect(self, reductions: Collection[str]) -> None:
        """Say which reductions (names of methods) will be asked for, each as often as it will be.

        One sweep over the gradients may serve several, and who asks for one gets a tensor of his own.
        """
        self._expected = Counter(reductions)

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
        self._expected[name] -= 1
        if self._expected[name] > 0:
            found = self._found[name]
            return Moments(*(t.clone() for t in found)) if isinstance(found, Moments) else found.clone()
        return self._found.pop(name)

    def _short(self, name: str) -> Tensor | Moments | None:
        """A reduction that is made without writing gradients out, where it can be."""
        return None

    def _sweep(self, names: Collection[str]) -> None:
        """Make reductions, one block of gradients after another."""
        reductions = {name: REDUCTIONS[name]() for name in names}
        for first, piece, gradients in self._pieces():
            for reduction in reductions.values():
                reduction.add(first, piece, gradients)
        self._found.update({name: reduction.result(self._assemble) for name, reduction in reductions.items()})

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first sample, number of the piece, [n, *piece]): all of the gradients, block by block."""
        for first, block in self.blocks():
            yield first, 0, block

    def _assemble(self, pieces: list[Tensor]) -> Tensor:
        """What was made of every piece, as a tensor of the parameter's shape."""
        return _only(pieces)

    def write_into(self, out: Tensor, factor: float = 1.0) -> None:
        """Write all gradients, times a factor, into `out` [N, *shape]; make the expected reductions on the way."""
        reductions: dict[str, Reduction] = {}
        for name in self._still_expected():
            found = self._short(name)
            if found is None:
                reductions[name] = REDUCTIONS[name]()
            else:
                self._found[name] = found
        for first, block in self._written_into(out):
            for reduction in reductions.values():
                reduction.add(first, 0, block)
            if factor != 1.0:
                block.mul_(factor)
        self._found.update({name: reduction.result(_only) for name, reduction in reductions.items()})

    def _written_into(self, out: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Write block after block; each is told when it is there."""
        for first, block in self.blocks():
            place = out[first : first + len(block)]
            place.copy_(block)
            yield first, place

    def materialised(self) -> Tensor:
        """All of it, [N, *shape]."""
        blocks = [block for _, block in self.blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


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


@dataclass(frozen=True)
class PreparedUse:
    """One use of a parameter, its saved inputs arranged sample-major: [N, T, …] each."""

    tap: Tap
    tap_index: int
    use: Use
    attribution: Attribution
    saved: tuple[Tensor, ...]

    def arranged_gradient(self, g: Tensor) -> Tensor:
        """The output's gradient as [N, T, …], at least in float32."""
        rule = self.tap.rule
        assert rule is not None
        g = g.to(accumulation_dtype(g.dtype))
        return self.attribution.arrange(rule.canonical(g), rule.row_axes)


def prepare_use(tap: Tap, tap_index: int, use: Use, attribution: Attribution) -> PreparedUse:
    """Arrange a tap's saved inputs once; every column uses them again."""
    rule = tap.rule
    assert rule is not None
    saved = tuple(
        attribution.arrange(t if not t.is_floating_point() else t.to(accumulation_dtype(t.dtype)), rule.row_axes)
        for t in rule.rows(tap.saved)
    )
    return PreparedUse(tap, tap_index, use, attribution, saved)


class ClosedForm(Contribution):
    """Gradients by rules, from the taps' inputs and output gradients."""

    method = "closed form"

    def __init__(
        self,
        uses: list[tuple[PreparedUse, Tensor]],
        like: Tensor,
        N: int,
        budget_bytes: int,
        relief: Relief | None = None,
        unfolded: Unfolded | None = None,
    ) -> None:
        super().__init__()
        self.uses, self._relief, self._unfolded = uses, relief, unfolded
        if relief is not None:
            budget_bytes >>= relief.halvings
        self._like, self._N, self._budget_bytes = like, N, budget_bytes
        self.shape = tuple(like.shape)
        element = accumulation_dtype(like.dtype).itemsize
        most = max(max(1, like.numel()) * element, self._working_bytes(element))
        self.block = max(1, min(N, min(budget_bytes, _block_bytes(like.device)) // most))

    def select(self, samples: Tensor) -> Contribution:
        uses = [(replace(p, saved=tuple(s[samples] for s in p.saved)), g[samples]) for p, g in self.uses]
        return ClosedForm(uses, self._like, len(samples), self._budget_bytes, self._relief)

    def with_uses(self, uses: list[tuple[PreparedUse, Tensor]]) -> "ClosedForm":
        """The same parameter's, from other output gradients."""
        return ClosedForm(uses, self._like, self._N, self._budget_bytes, self._relief)

    @property
    def samples_per_block(self) -> int:
        return self.block

    def multiply_adds(self) -> int:
        found = 0
        for prepared, g in self.uses:
            assert prepared.tap.rule is not None
            found += self._N * prepared.tap.rule.multiply_adds(prepared.use.role, _first(prepared.saved), g[:1])
        return found

    def norms_multiply_adds(self) -> int:
        if not self.is_reduced("squared_norms"):
            return self.multiply_adds()
        prepared, g = self.uses[0]
        assert prepared.tap.rule is not None
        return self._N * prepared.tap.rule.norms_multiply_adds(prepared.use.role, _first(prepared.saved), g[:1])

    def working_bytes(self) -> int:
        element = accumulation_dtype(self._like.dtype).itemsize
        return self.block * (2 * self._like.numel() * element + self._working_bytes(element))

    def is_reduced(self, reduction: str) -> bool:
        single = self.single()
        if single is None:
            return False
        prepared, g, rule = single
        one = _first(prepared.saved), torch.zeros_like(g[:1])
        reduce = rule.sum_squared if reduction == "sum_squared" else rule.squared_norms
        return reduce(prepared.use.role, *one) is not None

    def _working_bytes(self, element: int) -> int:
        """What one sample's intermediates take: a convolution's patches are its input times the kernel's size."""
        worst = 1
        for prepared, g in self.uses:
            assert prepared.tap.rule is not None
            held = prepared.tap.rule.working_elements(prepared.use.role, _first(prepared.saved), g[:1])
            worst = max(worst, held * element)
            if isinstance(prepared.use.watched.index, Derivation):  # its gradients come first
                worst = max(worst, prepared.use.watched.tensor.numel() * element)
        return worst

    def blocks(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        first = start
        while first < self._N:
            block = self._written(first)
            yield first, block
            first += len(block)

    def _written(self, first: int) -> Tensor:
        """The gradients of a block of samples, of fewer where memory runs out."""
        while True:
            try:
                return self.gradients(slice(first, first + self.block))
            except (RuntimeError, MemoryError) as error:
                self._halve(error)

    def _halve(self, error: RuntimeError | MemoryError) -> None:
        """Take fewer samples at a time from now on, if that may help against an error; else raise it."""
        if self.block == 1 or self._relief is None or not memory_ran_out(error):
            raise error
        self.block //= 2
        self._relief.halvings += 1

    def _sweep(self, names: Collection[str]) -> None:
        while True:
            try:
                return super()._sweep(names)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)

    def _short(self, name: str) -> Tensor | Moments | None:
        single = self.single()
        if single is None:
            return None
        prepared, g, rule = single
        role = prepared.use.role
        if name == "moments":
            return rule.moments(role, prepared.saved, g)
        if name == "total":
            return None
        reduce = rule.sum_squared if name == "sum_squared" else rule.squared_norms
        parts: list[Tensor] = []
        for block in self._slices():
            part = reduce(role, tuple(s[block] for s in prepared.saved), g[block])
            if part is None:
                return None
            parts.append(part)
        if name == "squared_norms":
            return torch.cat(parts)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def outer(self) -> Outer | None:
        single = self.single()
        if single is None:
            return None
        prepared, g, rule = single
        return rule.outer(prepared.use.role, prepared.saved, g)

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        single = self.single()
        if single is None:
            yield from super()._pieces()
            return
        prepared, g, rule = single
        for first in range(0, self._N, self.block):
            block = slice(first, first + self.block)
            saved, role = tuple(s[block] for s in prepared.saved), prepared.use.role
            unfolded = self._unfold(prepared, first)
            for piece, gradients in enumerate(rule.pieces(role, saved, g[block], unfolded)):
                yield first, piece, gradients

    def _unfold(self, prepared: PreparedUse, first: int) -> Tensor | None:
        """What the rule makes of the inputs of a block of samples, which columns to come may use again."""
        rule, block = prepared.tap.rule, slice(first, first + self.block)
        assert rule is not None

        def make() -> Tensor | None:
            return rule.unfold(prepared.use.role, tuple(s[block] for s in prepared.saved))

        if self._unfolded is None:
            return make()
        return self._unfolded.get((prepared.tap_index, prepared.use.role, first, self.block), make)

    def _assemble(self, pieces: list[Tensor]) -> Tensor:
        single = self.single()
        if single is None:
            return super()._assemble(pieces)
        prepared, _, rule = single
        return rule.assemble(prepared.use.role, pieces)

    def _written_into(self, out: Tensor) -> Iterator[tuple[int, Tensor]]:
        single = self.single()
        if single is None or not out.is_contiguous():
            yield from super()._written_into(out)
            return
        prepared, g, rule = single
        first = 0
        while first < self._N:
            block = slice(first, first + self.block)
            place, saved = out[block], tuple(s[block] for s in prepared.saved)
            try:
                written = rule.per_sample_into(prepared.use.role, saved, g[block], place)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            if not written:
                gradients = self._written(first)
                place = out[first : first + len(gradients)].copy_(gradients)
            yield first, place
            first += len(place)

    def _slices(self) -> Iterator[slice]:
        # A shorter form's intermediates do not grow with the parameter; keep blocks large.
        size = max(self.block, min(self._N, 1024))
        return (slice(first, first + size) for first in range(0, self._N, size))

    def single(self) -> tuple[PreparedUse, Tensor, Rule] | None:
        """The one use of the parameter as it is, which a rule's own reductions may serve."""
        if len(self.uses) != 1:
            return None
        prepared, g = self.uses[0]
        if prepared.use.watched.index is not None or prepared.tap.rule is None:
            return None
        return prepared, g, prepared.tap.rule

    def gradients(self, block: slice) -> Tensor:
        """Those of some samples, [n, *shape]."""
        total: Tensor | None = None
        for prepared, g in self.uses:
            rule = prepared.tap.rule
            assert rule is not None
            part = rule.per_sample(prepared.use.role, tuple(s[block] for s in prepared.saved), g[block])
            part = pull_back(part, prepared.use.watched.index, self.shape)
            total = part if total is None else total + part
        assert total is not None
        return total


def _only(pieces: list[Tensor]) -> Tensor:
    (whole,) = pieces
    return whole


def _first(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(s[:1] for s in saved)
