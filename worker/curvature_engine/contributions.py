"""One parameter's per-sample gradients for one cotangent, in the form that is cheapest to reduce.

A *contribution* is Σ over the parameter's uses of what each tap's rule gives. It is never written out whole unless
asked for: reductions go over blocks of samples that fit the budget, or use a rule's own shorter form.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature_engine.errors import memory_ran_out
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Attribution
from curvature_engine.rules import Rule
from curvature_engine.tape import Tap, Use, backward
from curvature_engine.watched import Derivation, pull_back


class Relief:
    """Counts how often blocks were halved because memory ran out: later ones begin at that size."""

    def __init__(self) -> None:
        self.halvings = 0


_ACCUMULATED_BYTES = 8
"""At most, of one number of a gradient."""


class Contribution(ABC):
    """Per-sample gradients of one parameter under one cotangent."""

    shape: tuple[int, ...]
    method = "fallback"

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

    def sum_squared(self, center: Tensor | None = None) -> Tensor:
        """Σ_n (g_n − center)², [*shape]."""
        total: Tensor | None = None
        for _, block in self.blocks():
            block = block if center is None else block - center
            part = torch.einsum("n...,n...->...", block, block)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def squared_norms(self) -> Tensor:
        """‖g_n‖², [N]."""
        return torch.cat([b.flatten(1).square().sum(1) if b.dim() > 1 else b.square() for _, b in self.blocks()])

    def total(self) -> Tensor:
        """Σ_n g_n, [*shape]."""
        total: Tensor | None = None
        for _, block in self.blocks():
            total = block.sum(0) if total is None else total.add_(block.sum(0))
        assert total is not None
        return total

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
    ) -> None:
        self.uses, self._relief = uses, relief
        if relief is not None:
            budget_bytes >>= relief.halvings
        self._like, self._N, self._budget_bytes = like, N, budget_bytes
        self.shape = tuple(like.shape)
        element = accumulation_dtype(like.dtype).itemsize
        per_sample = max(1, like.numel()) * element
        self.block = max(1, min(N, budget_bytes // max(per_sample, self._working_bytes(element))))

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
            kernel = math.prod(self.shape[2:]) if len(self.shape) > 2 else 1
            sizes = [g[:1].numel(), *(s[:1].numel() for s in prepared.saved)]
            worst = max(worst, max(sizes) * kernel * element)
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
                if self.block == 1 or self._relief is None or not memory_ran_out(error):
                    raise
            self.block //= 2
            self._relief.halvings += 1

    def sum_squared(self, center: Tensor | None = None) -> Tensor:
        if center is None and (single := self.single()) is not None:
            prepared, g, rule = single
            total: Tensor | None = None
            for block in self._slices():
                part = rule.sum_squared(prepared.use.role, tuple(s[block] for s in prepared.saved), g[block])
                if part is None:
                    return super().sum_squared()
                total = part if total is None else total.add_(part)
            assert total is not None
            return total
        return super().sum_squared(center)

    def squared_norms(self) -> Tensor:
        if (single := self.single()) is not None:
            prepared, g, rule = single
            parts = []
            for block in self._slices():
                part = rule.squared_norms(prepared.use.role, tuple(s[block] for s in prepared.saved), g[block])
                if part is None:
                    return super().squared_norms()
                parts.append(part)
            return torch.cat(parts)
        return super().squared_norms()

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


def _first(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(s[:1] for s in saved)
