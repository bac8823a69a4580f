"""What one column, propagated back through a part, contributes to every parameter."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Absent, Contribution, Fallback, Materialised
from curvature_engine.heads import Head, Passed, find_head
from curvature_engine.methods import Methods
from curvature_engine.orders import Order
from curvature_engine.precision import accumulation_dtype
from curvature_engine.program import Parameter
from curvature_engine.stacked import Stacked
from curvature_engine.tape import backward
from curvature_engine.tasks import Part
from curvature_engine.unfolded import Unfolded
from curvature_engine.verification import Verification


class Columns:
    """The columns of one part.

    Args:
        gradient: gives the part's rows of the loss's gradient, always the same tensor.
        kept_bytes: how much of what rules make of saved inputs may be kept for the next column.
    """

    def __init__(
        self,
        order: Order,
        selected: dict[str, Parameter],
        methods: Methods,
        part: Part,
        gradient: Callable[[], Tensor],
        kept_bytes: int,
    ) -> None:
        self._unfolded = Unfolded(kept_bytes)
        self._order, self._selected, self._methods = order, selected, methods
        self._part, self._gradient = part, gradient

    def ordinary_gradient(self, leaves: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """The loss's gradient in parameters; with `keep` those at the taps, which the same pass meets, are at hand."""
        taps, needed = self._part.forward.tape.taps, self._needed if keep else []
        found = backward(self._part.outputs, [*(taps[i].edges[0] for i in needed), *leaves], self._gradient())
        if keep:
            self._methods.at_hand = {i: taps[i].shaped([g])[0] for i, g in zip(needed, found, strict=False)}
        return found[len(needed) :]

    @cached_property
    def head(self) -> Head | None:
        """The program's end, through which several columns can go at once, if that is allowed."""
        if "fallback" in self._methods.by_parameter.values():
            return None
        return find_head(self._part.outputs, self._part.forward.tape, self._needed)

    @property
    def together(self) -> int:
        """How many columns are best sent back together."""
        return 1 if self.head is None else self.head.together(self._part.outputs.device)

    @property
    def _needed(self) -> list[int]:
        """The taps at which gradients are needed."""
        return sorted({u.tap_index for uses in self._methods.uses.values() for u in uses})

    def stacked(self, passed: Passed, k: int) -> Iterator[tuple[str, Stacked]]:
        """What k columns contribute to the parameters in the head alone."""
        for name, parameter in self._selected.items():
            uses = self._methods.uses[name]
            if not uses or not all(u.tap_index in passed.taps and Stacked.takes(u) for u in uses):
                continue
            stacked = [(u, u.arranged_gradients(passed.taps[u.tap_index])) for u in uses]
            yield name, Stacked(stacked, parameter.tensor, k, self._part.n, self._order.budget.block_bytes)

    def one_of(
        self, passed: Passed, column: int, cotangent: Tensor, names: Collection[str]
    ) -> Iterator[tuple[str, Contribution]]:
        """What one of the columns that went through the head together contributes to some parameters.

        Under `verify` it is checked for all parameters.
        """
        verification = self._verification(cotangent)
        if verification is not None:
            names = self._selected
        needed = {u.tap_index for name in names for u in self._methods.uses[name]}
        taps = self._part.forward.tape.taps
        gradients = {i: taps[i].shaped([passed.taps[i][column]])[0] for i in needed if i in passed.taps}
        rest = sorted(needed - gradients.keys())
        if self.head is None or self.head.end is None or passed.behind is None:
            gradients |= dict.fromkeys(rest)
        elif rest:
            gradients |= self._part.at_taps(rest, passed.behind[column], self.head.end)
        arranged: dict[int, Tensor] = {}
        for name in names:
            contribution = self.closed(name, self._selected[name], gradients, arranged)
            if verification is not None:
                verification.check(name, contribution)
            yield name, contribution
        self._heed(verification)

    def contributions(self, cotangent: Tensor) -> Iterator[tuple[str, Contribution]]:
        """Every parameter's contribution under a cotangent."""
        needed, at_hand = self._needed, self._methods.at_hand
        at_hand = at_hand if at_hand and cotangent is self._gradient() else {}
        gradients = at_hand if at_hand.keys() >= set(needed) else self._part.at_taps(needed, cotangent)
        fallbacks = self._fallbacks(cotangent)
        verification = self._verification(cotangent)
        arranged: dict[int, Tensor] = {}
        for name, parameter in self._selected.items():
            contribution = fallbacks.get(name) or self.closed(name, parameter, gradients, arranged)
            if verification is not None:
                verification.check(name, contribution)
            yield name, contribution
        self._heed(verification)

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

    def _fallbacks(self, cotangent: Tensor) -> dict[str, Contribution]:
        """Per-sample gradients of the parameters without closed form: together where they fit the budget."""
        names = [n for n, method in self._methods.by_parameter.items() if method == "fallback"]
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
