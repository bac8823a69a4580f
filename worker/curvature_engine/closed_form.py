"""Gradients by rules, from the inputs of a parameter's operators and the gradients of their outputs."""

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import memory_ran_out
from curvature_engine.fused_squares import fused_squares
from curvature_engine.pages import PAGES
from curvature_engine.precision import accumulation_dtype
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.reductions import Assemble, Moments, Outer, Reduction, SumSquared, UncentredSpread
from curvature_engine.rules import Rule
from curvature_engine.tiles import assemble as assemble_tiles
from curvature_engine.tiles import pay, reduce_tiles
from curvature_engine.unfolded import Unfolded
from curvature_engine.watched import Derivation, pull_back

_CACHED_BYTES = 2**24
"""Of gradients that are reduced while they lie in a CPU's cache."""
_HOT_BYTES = 2**20
"""Of gradients in a buffer that a core's own cache holds: made, reduced, and overwritten by the next."""
_MANY = 16
"""Samples of which it is rare that some entry's gradients hardly differ."""
_LOOK = 8
"""Multiplications and additions that take as long as reading one number from memory."""
_RESIDENT_BYTES = 2**28
"""Of those that keep an accelerator busy."""
_HELD_BYTES = 2**22
"""Of what is made of the inputs to write gradients to their place: more would leave a CPU's cache before it is used."""


def _held_bytes(device: torch.device) -> int:
    return _HELD_BYTES if device.type == "cpu" else _RESIDENT_BYTES


def _block_bytes(device: torch.device) -> int:
    return _CACHED_BYTES if device.type == "cpu" else _RESIDENT_BYTES


class Relief:
    """Counts how often blocks were halved because memory ran out: later ones begin at that size."""

    def __init__(self) -> None:
        self.halvings = 0


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
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.uses, self._relief, self._unfolded = uses, relief, unfolded
        if relief is not None:
            budget_bytes >>= relief.halvings
        self._like, self._N, self._budget_bytes = like, N, budget_bytes
        self.shape = tuple(like.shape)
        self.block = self._fitting_block() if block is None else block
        self._tiled = self._is_tiled()
        self._span = self._fitting_span() if self._tiled else self.block

    def _fitting_block(self) -> int:
        """How many samples' gradients fit, with what making them takes."""
        element = accumulation_dtype(self._like.dtype).itemsize
        most = max(max(1, self._like.numel()) * element, self._working_bytes(element))
        return max(1, min(self._N, min(self._budget_bytes, _block_bytes(self._like.device)) // most))

    def _is_tiled(self) -> bool:
        """Whether sums over samples are made tile by tile."""
        single = self.single() if pay(self._like) else None
        return single is not None and single[2].is_product(single[0].use.role, single[1])

    def _fitting_span(self) -> int:
        """How many samples' inputs are unfolded at a time for sums over tiles, which take next to no memory."""
        working = self._working_bytes(accumulation_dtype(self._like.dtype).itemsize)
        return max(1, self.block, min(self._N, min(self._budget_bytes, _CACHED_BYTES) // working))

    def select(self, samples: Tensor) -> Contribution:
        uses = [(replace(p, chosen=tuple(s[samples] for s in p.saved)), g[samples]) for p, g in self.uses]
        return ClosedForm(uses, self._like, len(samples), self._budget_bytes, self._relief)

    @property
    def _height(self) -> int:
        return self.shape[0] if self.shape else 1

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
        return 2 * self.block * self._like.numel() * element + self._span * self._working_bytes(element)

    def is_reduced(self, reduction: str) -> bool:
        single = self.single()
        if single is None:
            return False
        prepared, g, rule = single
        return rule.is_reduced(reduction, prepared.use.role, _first(prepared.saved), g[:1])

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
                return self._made(slice(first, first + self.block))
            except (RuntimeError, MemoryError) as error:
                self._halve(error)

    def _made(self, block: slice) -> Tensor:
        """Those of some samples, with the bits that `write_into` gives them."""
        if len(self.uses) == 1 or torch.is_grad_enabled():
            return self.gradients(block)
        n = len(range(*block.indices(self._N)))
        out = self._like.new_empty((n, *self.shape), dtype=accumulation_dtype(self._like.dtype))
        self._write(block, out)
        return out

    def _halve(self, error: RuntimeError | MemoryError) -> None:
        """Make room, or take fewer samples at a time from now on, if that may help against an error; else raise it."""
        if memory_ran_out(error) and PAGES.drop():
            return
        if max(self.block, self._span) == 1 or self._relief is None or not memory_ran_out(error):
            raise error
        self.block, self._span = max(1, self.block // 2), max(1, self._span // 2)
        self._relief.halvings += 1

    def _sweep(self, names: Collection[str]) -> None:
        while True:
            try:
                return super()._sweep(names)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)

    def _reduction(self, name: str) -> Reduction:
        if name == "moments" and self._tiled and self._N >= _MANY:
            return UncentredSpread()
        return super()._reduction(name)

    def squares_in_pieces(self) -> tuple[SumSquared, Assemble] | None:
        single = self._single_for_pieces()
        if single is None:
            return None
        prepared, _, rule = single
        while True:
            squares = SumSquared()
            try:
                self._add_squares(single, squares)
                return squares, partial(assemble_tiles, rule, prepared.use.role, self._height)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)

    def add_squares_to(self, squares: SumSquared) -> bool:
        single = self._single_for_pieces()
        if single is not None:
            self._add_squares(single, squares)
        return single is not None

    def _single_for_pieces(self) -> tuple[PreparedUse, Tensor, Rule] | None:
        return None if sum(self._expected.values()) > 1 else self.single()

    def _add_squares(self, single: tuple[PreparedUse, Tensor, Rule], squares: SumSquared) -> None:
        fused = fused_squares(single[0], single[1], self.block, self._unfold)
        if fused is None:
            self._show([squares])
        else:
            squares.add_sums(fused)

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
                return rule.assemble(role, squares)
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

    def _is_dearer(self, name: str) -> bool:
        return name == "squared_norms" and self.norms_multiply_adds() > _LOOK * self._N * self._like.numel()

    def outer(self) -> Outer | None:
        single = self.single()
        if single is None:
            return None
        prepared, g, rule = single
        return rule.outer(prepared.use.role, prepared.saved, g)

    def _pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        single = self.single()
        if single is None or single[2].whole:
            yield from ((first, 0, block) for first, block in self._hot_blocks())
            return
        prepared, g, rule = single
        for first in range(0, self._N, self._span):
            saved, some = self._spanned(prepared, g, first)
            unfolded = self._unfold(prepared, first)
            for piece, gradients in enumerate(rule.pieces(prepared.use.role, saved, some, unfolded)):
                yield first, piece, gradients

    def _show(self, reductions: Collection[Reduction]) -> None:
        if not self._tiled:
            super()._show(reductions)
            return
        for first in range(0, self._N, self._span):
            pairs = self.factors(first)
            assert pairs is not None  # as `is_product` says
            reduce_tiles(first, pairs, reductions)

    @property
    def N(self) -> int:
        """How many samples."""
        return self._N

    @property
    def like(self) -> Tensor:
        """The parameter."""
        return self._like

    @property
    def numel(self) -> int:
        """Of one sample's gradient."""
        return self._like.numel()

    def factors(self, first: int) -> Iterator[tuple[Tensor, Tensor]] | None:
        """What the gradients of a block of samples are the products of, by piece; None where they are none."""
        single = self.single()
        if single is None:
            return None
        prepared, g, rule = single
        saved, some = self._spanned(prepared, g, first)
        return rule.products(prepared.use.role, saved, some, self._unfold(prepared, first))

    def _spanned(self, prepared: PreparedUse, g: Tensor, first: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Saved inputs and gradients of the samples that are unfolded together."""
        if self._span >= self._N:
            return tuple(prepared.saved), g
        span = slice(first, first + self._span)
        return tuple(s[span] for s in prepared.saved), g[span]

    def _unfold(self, prepared: PreparedUse, first: int) -> Tensor | None:
        """What the rule makes of the inputs of a block of samples, which columns to come may use again."""
        rule = prepared.tap.rule
        assert rule is not None

        def make() -> Tensor | None:
            span = slice(first, first + self._span)
            return rule.unfold(prepared.use.role, tuple(s[span] for s in prepared.saved))

        if self._unfolded is None:
            return make()
        return self._unfolded.get(self._key(prepared, first), make)

    def _key(self, prepared: PreparedUse, first: int) -> Hashable:
        return prepared.tap_index, prepared.use.role, first, self._span

    def kept_factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """`factors` of all samples, if what was made of the inputs is kept for columns to come; else None."""
        single = self.single()
        if single is None or self.block < self._N or self._unfolded is None:
            return None
        pairs = self.factors(0)
        return list(pairs) if pairs is not None and self._unfolded.keeps(self._key(single[0], 0)) else None

    def kept_windows(self, most_bytes: int | None = None) -> Tensor | None:
        """The rule's `inputs_by_position` of all samples, if there are such, and if they are kept; else None.

        None, too, where they would take more than `most_bytes`.
        """
        single = self.single()
        if single is None or self.block < self._N or self._unfolded is None:
            return None
        prepared, g, rule = single
        role, key = prepared.use.role, (prepared.tap_index, prepared.use.role, "windows")
        if rule.by_position(role, g) is None:
            return None
        elements = rule.windows_elements(role, prepared.saved)
        if not elements:  # what is there anyway
            return rule.inputs_by_position(role, prepared.saved)
        nbytes = elements * g.element_size()
        if not self._unfolded.has_room(key, nbytes) or (most_bytes is not None and nbytes > most_bytes):
            return None
        return self._unfolded.get(key, lambda: rule.inputs_by_position(role, prepared.saved))

    def _assemble(self, pieces: list[Tensor]) -> Tensor:
        single = self.single()
        if single is None:
            return super()._assemble(pieces)
        prepared, _, rule = single
        return assemble_tiles(rule, prepared.use.role, self._height, pieces)

    def scaled(self, factor: float) -> Contribution:
        if factor == 1.0:
            return self
        uses = [(p, g * factor) for p, g in self.uses]
        return ClosedForm(uses, self._like, self._N, self._budget_bytes, self._relief, self._unfolded, self.block)

    def _hot_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """As `blocks`, in a buffer that every block overwrites, where gradients can be written into one.

        Fresh memory costs more than the products that fill it, and a small buffer stays in the cache.
        """
        size = self._samples_written(reduced=True)
        buffer = self._like.new_empty((size, *self.shape), dtype=accumulation_dtype(self._like.dtype))
        for first in range(0, self._N, size):
            place = buffer[: self._N - first]
            if not self._write(slice(first, first + size), place):
                yield from self.blocks(first)
                return
            yield first, place

    @property
    def _hot_samples(self) -> int:
        if self._like.device.type != "cpu":
            return self.block
        one = max(1, self._like.numel()) * accumulation_dtype(self._like.dtype).itemsize
        return max(1, min(self.block, _HOT_BYTES // one))

    def _write(self, block: slice, out: Tensor) -> bool:
        """Write the gradients of some samples into `out` [n, *shape]; False where that takes a copy of a whole."""
        # What touches few elements is cheapest added to what is there.
        for place, (prepared, g) in enumerate(sorted(self.uses, key=lambda use: use[0].scatters)):
            rule, role, index = prepared.tap.rule, prepared.use.role, prepared.use.watched.index
            assert rule is not None
            saved, g = tuple(s[block] for s in prepared.saved), g[block]
            if index is None and place == 0 and rule.per_sample_into(role, saved, g, out):
                continue
            if len(self.uses) == 1:
                return False
            if index is None and place > 0:
                rule.add_per_sample(role, saved, g, out)
            else:
                part = pull_back(rule.per_sample(role, saved, g), index, self.shape)
                out.add_(part) if place else out.copy_(part)
        return True

    def _written_into(self, out: Tensor, *, reduced: bool) -> Iterator[tuple[int, Tensor]]:
        if not out.is_contiguous():
            yield from super()._written_into(out, reduced=reduced)
            return
        first, size = 0, self._samples_written(reduced=reduced)
        while first < self._N:
            block = slice(first, first + size)
            place = out[block]
            try:
                written = self._write(block, place)
            except (RuntimeError, MemoryError) as error:
                if size <= self.block or not memory_ran_out(error):
                    self._halve(error)
                size = self.block
                continue
            if not written:
                gradients = self._written(first)
                place = out[first : first + len(gradients)].copy_(gradients)
            yield first, place
            first += len(place)

    def _samples_written(self, *, reduced: bool) -> int:
        """How many samples' gradients are written to their place at a time: all, if they take nothing beside it."""
        single = self.single()
        size = self._N
        if single is None:
            size = self.block
        else:
            prepared, g, rule = single
            held = rule.into_elements(prepared.use.role, _first(prepared.saved), g[:1]) * g.element_size()
            if held:
                least = torch.get_num_threads() * held  # which share the samples among them
                size = max(1, min(size, self._budget_bytes // held, max(least, _held_bytes(g.device)) // held))
        if reduced:
            size = min(size, self._hot_samples if single is None or single[2].whole else self.block)
        return size

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
        """Those of some samples, [n, *shape]; they can be differentiated where what they are made of can."""
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
