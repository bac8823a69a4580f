"""Gradients by rules, from the inputs of a parameter's operators and the gradients of their outputs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import memory_ran_out
from curvature_engine.fused_squares import fused_squares
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Attribution
from curvature_engine.reductions import Moments, Outer
from curvature_engine.rules import Rule
from curvature_engine.tape import Tap, Use
from curvature_engine.unfolded import Unfolded
from curvature_engine.watched import Derivation, pull_back

_CACHED_BYTES = 2**24
"""Of gradients that are reduced while they lie in a CPU's cache."""
_RESIDENT_BYTES = 2**28
"""Of those that keep an accelerator busy."""


def _block_bytes(device: torch.device) -> int:
    return _CACHED_BYTES if device.type == "cpu" else _RESIDENT_BYTES


class Relief:
    """Counts how often blocks were halved because memory ran out: later ones begin at that size."""

    def __init__(self) -> None:
        self.halvings = 0


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

    def _short(self, name: str, *, written: bool = False) -> Tensor | Moments | None:
        single = self.single()
        if single is None:
            return None
        prepared, g, rule = single
        role = prepared.use.role
        if name == "moments":
            return rule.moments(role, prepared.saved, g)
        if name == "total":
            return None
        if name == "sum_squared" and not written and set(self._still_expected()) <= {name}:
            squares = fused_squares(prepared, g, self.block, self._unfold)
            if squares is not None:
                return squares
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


def _first(saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(s[:1] for s in saved)
