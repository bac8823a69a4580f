"""What one column, propagated back through a part, contributes to every parameter."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature_engine import streaming
from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Absent, Contribution, Fallback, Materialised
from curvature_engine.methods import Methods
from curvature_engine.orders import Order
from curvature_engine.precision import accumulation_dtype
from curvature_engine.prepared_uses import Arranged
from curvature_engine.program import Parameter
from curvature_engine.stacked import Stacked
from curvature_engine.streaming import Arrivals, Stream
from curvature_engine.stretches import Passed, Stretch, find_stretches
from curvature_engine.tape import backward
from curvature_engine.tasks import Part
from curvature_engine.unfolded import Unfolded
from curvature_engine.verification import Verification
from curvature_engine.watched import Derivation

Take = Callable[[str, Contribution], None]
"""Takes a parameter's contribution, whose gradients may be let go when it returns."""


class Columns:
    """The columns of one part.

    Args:
        gradient: gives the part's rows of the loss's gradient, always the same tensor.
        kept_bytes: how much of what rules make of saved inputs may be kept for the next column.
        once: whether there is no next column, nor anything else that goes back after it: then neither the graph nor
            saved inputs that were arranged have to stay.
    """

    def __init__(
        self,
        order: Order,
        selected: dict[str, Parameter],
        methods: Methods,
        part: Part,
        gradient: Callable[[], Tensor],
        kept_bytes: int,
        *,
        once: bool,
    ) -> None:
        self._unfolded, self._once = Unfolded(kept_bytes), once
        self._order, self._selected, self._methods = order, selected, methods
        self._part, self._gradient = part, gradient
        self._ways: dict[Hashable, Stream] = {}

    def take(self, cotangent: Tensor, take: Take) -> None:
        """Have every parameter's contribution under a cotangent taken: where that pays, as its gradients arrive."""
        if not self._streams or (self._methods.at_hand and cotangent is self._gradient()):
            for name, contribution in self.contributions(cotangent, further=False):
                take(name, contribution)
                del contribution  # before the next is made
            return
        outputs = self._part.outputs
        way = self._way(get_gradient_edge(outputs), self._needed)
        self._stream(way, outputs, cotangent, self._selected, {}, take, once=self._once)

    def take_with_gradient(
        self, leaves: Sequence[Tensor], names: Collection[str], take: Take, taken: set[int], *, further: bool
    ) -> list[Tensor | None] | None:
        """Have some parameters taken under the loss's gradient, which the same pass brings to `leaves`.

        None, and nothing taken, where that does not pay. Where gradients lay that may have been kept is added to
        `taken`; `further` says whether a column is still to come.
        """
        if not self._streams or self._methods.at_hand or not names:
            return None
        outputs = self._part.outputs
        way = self._way(get_gradient_edge(outputs), self._needed_for(names), leaves)
        once = self._once and not further
        return self._stream(way, outputs, self._gradient(), names, {}, take, taken, once=once)

    def ordinary_gradient(
        self, leaves: Sequence[Tensor], names: Collection[str], *, further: bool
    ) -> list[Tensor | None]:
        """The loss's gradient in leaves; the same pass has those at the taps of some parameters at hand.

        `further` says whether a column is still to come.
        """
        taps = self._part.forward.tape.taps
        needed = [i for i in self._needed_for(names) if i not in self._methods.at_hand]
        targets = [*(taps[i].edges[0] for i in needed), *leaves]
        last = not further and self._ends
        found = backward(self._part.outputs, targets, self._gradient(), last=last)
        if last:
            for number, tap in enumerate(taps):
                if number not in needed and number not in self._methods.at_hand:
                    tap.let_go()
        self._methods.at_hand |= {i: taps[i].shaped([g])[0] for i, g in zip(needed, found, strict=False)}
        return found[len(needed) :]

    @cached_property
    def summed(self) -> frozenset[str]:
        """Parameters whose gradient is best had as the sum of the samples' own."""
        if self._part.outputs.device.type != "cpu" or self._order.verify:
            return frozenset()
        singles = ((name, uses[0]) for name, uses in self._methods.uses.items() if len(uses) == 1)
        return frozenset(
            name
            for name, use in singles
            if use.tap.rule is not None
            and use.tap.rule.sums
            and use.use.watched.index is None
            and len(self._selected[name].tensors) == 1
        )

    @cached_property
    def stretches(self) -> Sequence[Stretch]:
        """Through which several columns can go at once, from the outputs on, if that is allowed."""
        if "fallback" in self._methods.by_parameter.values():
            return ()
        return find_stretches(self._part.outputs, self._part.forward.tape, self._needed)

    @property
    def together(self) -> int:
        """How many columns are best made and sent back together."""
        return self.stretches[0].together if self.stretches else 1

    def at_outputs(self, columns: Tensor) -> Passed:
        """Columns [k, *outputs], about to go back."""
        return Passed(columns, {}, get_gradient_edge(self._part.outputs), columns)

    @property
    def _needed(self) -> list[int]:
        """The taps at which gradients are needed."""
        return self._needed_for(self._methods.uses)

    def _needed_for(self, names: Collection[str]) -> list[int]:
        return sorted({u.tap_index for name in names for u in self._methods.uses.get(name, ())})

    def stacked(self, passed: Passed, names: Collection[str]) -> Iterator[tuple[str, Stacked]]:
        """What several columns contribute to those of some parameters whose taps were all passed."""
        arranged: dict[int, Tensor] = {}
        for name in names:
            uses = self._methods.uses[name]
            if not uses or not all(u.tap_index in passed.taps and Stacked.takes(u) for u in uses):
                continue
            for use in uses:
                if use.tap_index not in arranged:
                    arranged[use.tap_index] = use.arranged_gradients(passed.taps[use.tap_index])
            stacked = [(use, arranged[use.tap_index]) for use in uses]
            k, n, block_bytes = len(passed.columns), self._part.n, self._order.budget.block_bytes
            yield name, Stacked(stacked, self._selected[name].tensor, k, n, block_bytes, self._unfolded)

    def take_one_of(self, passed: Passed, column: int, names: Collection[str], take: Take) -> None:
        """As `take`, of one of the columns that came some of the way together, and for some parameters.

        Under `verify` it is checked for all parameters.
        """
        known = self._passed_taps(passed, column, names)
        rest = [i for i in self._needed_for(names) if i not in known]
        if self._streams and rest and passed.end is not None:
            way = self._way(passed.end, rest)
            self._stream(way, passed.end, passed.behind[column], names, known, take, once=self._once)
            return
        for name, contribution in self._one_of(passed, column, names):
            take(name, contribution)

    def _passed_taps(self, passed: Passed, column: int, names: Collection[str]) -> dict[int, Tensor | None]:
        """The gradients at the taps passed that some parameters need, of one of the columns."""
        taps = self._part.forward.tape.taps
        inside = (i for i in self._needed_for(names) if i in passed.taps)
        return {i: taps[i].shaped([passed.taps[i][column]])[0] for i in inside}

    def _one_of(self, passed: Passed, column: int, names: Collection[str]) -> Iterator[tuple[str, Contribution]]:
        verification = self._verification(passed.columns[column])
        if verification is not None:
            names = self._selected
        gradients = self._passed_taps(passed, column, names)
        rest = [i for i in self._needed_for(names) if i not in gradients]
        if passed.end is None:
            gradients |= dict.fromkeys(rest)
        elif rest:
            gradients |= self._part.at_taps(rest, passed.behind[column], passed.end)
        arranged: dict[int, Tensor] = {}
        for name in names:
            contribution = self.closed(name, self._selected[name], gradients, arranged)
            if verification is not None:
                verification.check(name, contribution)
            yield name, contribution
        self._heed(verification)

    def contributions(
        self, cotangent: Tensor, names: Collection[str] | None = None, *, further: bool = True
    ) -> Iterator[tuple[str, Contribution]]:
        """Some parameters' contribution under a cotangent; those of all where none are named.

        `further` says whether a column is still to come. If not, what no other parameter needs is let go of when the
        next is asked for.
        """
        names = self._selected if names is None else names
        needed, at_hand = self._needed_for(names), self._methods.at_hand
        at_hand = at_hand if at_hand and cotangent is self._gradient() else {}
        fallbacks = self._fallbacks(cotangent, names)
        verification = self._verification(cotangent)
        last = not further and self._ends
        known = at_hand.keys() >= set(needed)
        gradients = dict(at_hand) if known else self._part.at_taps(needed, cotangent, last=last)
        if last:
            self._methods.at_hand = {}
        del at_hand
        arranged: dict[int, Tensor] = {}
        users = Counter(number for name in names for number in self._taps_of(name))
        for name in names:
            parameter = self._selected[name]
            contribution = fallbacks.get(name) or self.closed(name, parameter, gradients, arranged)
            if verification is not None:
                verification.check(name, contribution)
            yield name, contribution
            del contribution
            users.subtract(self._taps_of(name))
            for number in self._taps_of(name) if last else ():
                if not users[number]:
                    gradients.pop(number)
                    arranged.pop(number, None)
                    self._let_go(number)
        self._heed(verification)

    @property
    def _ends(self) -> bool:
        """Whether nobody needs the graph, nor what was saved, after the column if it is the last."""
        return self._once and not self._order.verify and not self._goes_further_back

    @cached_property
    def _goes_further_back(self) -> bool:
        """Whether some gradients take backward passes of their own, over the graph or what parameters are made by."""
        derived = (isinstance(u.use.watched.index, Derivation) for uses in self._methods.uses.values() for u in uses)
        return "fallback" in self._methods.by_parameter.values() or any(derived)

    def _taps_of(self, name: str) -> set[int]:
        """Numbers of the taps that consume a parameter."""
        return {use.tap_index for use in self._methods.uses.get(name, ())}

    def _let_go(self, number: int) -> None:
        """Hold a tap's inputs no longer."""
        self._arranged[number].let_go()
        self._part.forward.tape.taps[number].let_go()

    @cached_property
    def _arranged(self) -> Mapping[int, Arranged]:
        """By tap."""
        return {use.tap_index: use.arranged for uses in self._methods.uses.values() for use in uses}

    @cached_property
    def _streams(self) -> bool:
        """Whether gradients are reduced as they arrive: where they are large, and nothing else goes back meanwhile."""
        order, taps = self._order, self._part.forward.tape.taps
        if self._part.outputs.device.type != "cpu" or order.verify or order.against:
            return False
        if self._goes_further_back:
            return False
        itemsize = self._part.outputs.element_size()
        return sum(math.prod(taps[i].shapes[0]) for i in self._needed) * itemsize >= streaming.LEAST_BYTES

    def waiting_bytes(self, all_bytes: int) -> int:
        """What is held at a time of the gradients at all taps, which take `all_bytes`."""
        verdict = self._methods.verdict
        if not self._streams or verdict is None or verdict.strides is None:  # confirming one may have all at hand
            return all_bytes
        way = self._way(get_gradient_edge(self._part.outputs), self._needed)
        by_parameter = ({u.tap_index for u in uses} for uses in self._methods.uses.values())
        kept = set(way.last).union(*(numbers for numbers in by_parameter if len(numbers) > 1))
        itemsize = accumulation_dtype(self._part.outputs.dtype).itemsize
        sizes = {i: math.prod(self._part.forward.tape.taps[i].shapes[0]) * itemsize for i in self._needed}
        passing = max((size for i, size in sizes.items() if i not in kept), default=0)
        return min(all_bytes, passing + sum(sizes[i] for i in kept))

    def _way(self, start: GradientEdge, numbers: Sequence[int], leaves: Sequence[Tensor] = ()) -> Stream:
        """The way from an edge to some taps and to leaves; columns go the same ways."""
        key = start, *numbers, *(id(leaf) for leaf in leaves)
        if key not in self._ways:
            taps = self._part.forward.tape.taps
            self._ways[key] = Stream(start, {i: taps[i] for i in numbers}, leaves)
        return self._ways[key]

    def _stream(
        self,
        way: Stream,
        start: Tensor | GradientEdge,
        cotangent: Tensor,
        names: Collection[str],
        known: dict[int, Tensor | None],
        take: Take,
        taken: set[int] | None = None,
        *,
        once: bool,
    ) -> list[Tensor | None]:
        uses = {name: self._taps_of(name) for name in self._selected if name in names}

        def ready(name: str, gradients: dict[int, Tensor | None]) -> None:
            take(name, self.closed(name, self._selected[name], gradients, {}))

        def done(number: int) -> None:
            if once:
                self._let_go(number)

        arrivals = Arrivals(uses, ready, done)

        def receive(number: int, gradient: Tensor | None) -> None:
            if taken is not None and gradient is not None:
                taken.add(gradient.untyped_storage().data_ptr())
            arrivals.receive(number, gradient)

        for number, gradient in known.items():
            arrivals.receive(number, gradient)
        found = way.back(start, cotangent, receive, last=once)
        for name in (name for name, numbers in uses.items() if not numbers):
            ready(name, {})
        return found

    def _verification(self, cotangent: Tensor) -> Verification | None:
        return Verification(self._part.outputs, self._selected, cotangent) if self._order.verify else None

    def _heed(self, verification: Verification | None) -> None:
        if verification is not None and not verification.finite:
            self._methods.distrust()

    def pattern(self, name: str) -> Contribution:
        """A parameter's contribution with the shapes that it will have, and no numbers."""
        parameter, n = self._selected[name], self._part.n
        if name not in self._methods.uses:
            return Fallback(self._part.outputs, parameter.tensors, self._part.outputs.new_zeros(()).expand(n))
        uses = []
        for prepared in self._methods.uses[name]:
            g = prepared.arranged_gradient(self._part.outputs.new_zeros(()).expand(prepared.tap.shapes[0]))
            uses.append((prepared, g))
        if not uses:
            return Absent(parameter.tensor, n)
        return ClosedForm(uses, parameter.tensor, n, self._order.budget.block_bytes)

    def closed(
        self, name: str, parameter: Parameter, gradients: Mapping[int, Tensor | None], arranged: dict[int, Tensor]
    ) -> Contribution:
        """A parameter's closed form, from the gradients at its taps; `arranged` keeps them for other parameters."""
        uses = []
        for prepared in self._methods.uses[name]:
            tap, g = prepared.tap_index, gradients[prepared.tap_index]
            if g is not None:
                if tap not in arranged:
                    arranged[tap] = prepared.arranged_gradient(g)
                uses.append((prepared, arranged[tap]))
        if not uses:
            return Absent(parameter.tensor, self._part.n)
        order, verdict = self._order, self._methods.verdict
        assert verdict is not None
        key = "block", name, len(uses), self._part.n, order.budget.block_bytes, order.relief.halvings
        block: int | None = verdict.derived.get(key)
        contribution = ClosedForm(
            uses, parameter.tensor, self._part.n, order.budget.block_bytes, order.relief, self._unfolded, block
        )
        if block is None:
            verdict.derived.recall(key, lambda: contribution.block)
        return contribution

    def _fallbacks(self, cotangent: Tensor, names: Collection[str]) -> dict[str, Contribution]:
        """Per-sample gradients of those without closed form: together where they fit the budget."""
        names = [n for n, method in self._methods.by_parameter.items() if method == "fallback" and n in names]
        if not names:
            return {}
        N, outputs = self._part.n, self._part.outputs
        tensors = {n: self._selected[n].tensors for n in names}
        size = sum(t[0].numel() * 8 * N for t in tensors.values())
        if size > self._order.budget.block_bytes:
            return {n: Fallback(outputs, tensors[n], cotangent) for n in names}
        flat = [t for n in names for t in tensors[n]]
        stacks = [torch.zeros((N, *t.shape), dtype=accumulation_dtype(t.dtype), device=t.device) for t in flat]
        restricted = torch.zeros_like(cotangent)
        for n in range(N):
            restricted[n] = cotangent[n]
            found = backward(outputs, flat, restricted)
            for stack, gradient in zip(stacks, found, strict=True):
                if gradient is not None:
                    stack[n] = gradient
            restricted[n] = 0  # only now: what was added to the outputs has the cotangent itself as its gradient
        result: dict[str, Contribution] = {}
        for name in names:
            parts = [stacks.pop(0) for _ in tensors[name]]
            result[name] = Materialised(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return result
