"""Backward passes to the taps: one for the loss's gradient, one per column of the square root of its Hessian.

Each is reduced by every extension that asked for it before the next is made; through a program's head, columns go
together. The samples come in one part, or in several, each with a forward pass of its own; the loss is always that of
the whole batch.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.averaged_factors import AveragedFactors
from curvature_engine.chain import edge_key, reached_edges
from curvature_engine.columns import Columns, Take
from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions import Setting
from curvature_engine.filling import fill
from curvature_engine.losses import BoundLoss
from curvature_engine.methods import Methods
from curvature_engine.orders import Order
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Verdict
from curvature_engine.program import Parameter
from curvature_engine.requests import Request
from curvature_engine.residuals import Residuals, affine, find_bends
from curvature_engine.results import Group
from curvature_engine.speculation import speculates
from curvature_engine.stores import Layout, ResultStore
from curvature_engine.sweeps import expected_of, send
from curvature_engine.tape import Tape
from curvature_engine.tasks import Part, Share, Task, chosen_samples

T = TypeVar("T")
One = Callable[[int], Tensor]
"""Makes a column of the whole batch, [N, …], by its number."""
Several = Callable[[int, int], Tensor]
"""Makes several, [k, N, …], from a number on and up to another."""


class BackwardPasses:
    """The backward passes of one request.

    Attributes:
        columns: how many columns of each kind are wanted.
    """

    def __init__(self, order: Order, bound: BoundLoss, selected: dict[str, Parameter]) -> None:
        self._order = order
        self._bound = bound
        self._selected = selected
        self._methods = Methods(order, selected)
        self._part: Part
        self._of_loss: Callable[[], Tensor]
        self._columns: Columns
        self._elementwise: set[str] = set()
        self._averaged: AveragedFactors | None = None
        self._gradients: dict[str, Tensor] = {}
        self._tasks: list[Task] = []
        self._done, self._total = 0, 0
        exact = [r for r in order.requests if r.extension.columns == "exact"]
        self._any_root = all(r.extension.any_root for r in exact)
        self.columns = _count_columns(
            order.requests, 0 if not exact else bound.rank if self._any_root else bound.columns
        )

    @property
    def _gradient(self) -> Tensor:
        """The current part's rows of the loss's gradient, which is not made before somebody asks."""
        return self._of_loss()

    @property
    def methods(self) -> Mapping[str, str]:
        """Parameter → "closed form" or "fallback"; of several parts the least."""
        return self._methods.by_parameter

    @property
    def kind(self) -> Hashable:
        """What is asked: the same for batches whose plans are alike where the rest is."""
        requests = tuple((r.label, r.extension.name, repr(sorted(r.options.items()))) for r in self._order.requests)
        return requests, tuple(sorted(self.columns.items())), self._order.part is not None, self._order.verify

    @property
    def probed(self) -> int | None:
        """How many samples are probed where the current part's path is new; None for all."""
        return None if self._order.verify or self.verdict is None else self.verdict.probed

    @property
    def verdict(self) -> Verdict | None:
        """On the current part's path."""
        return self._methods.verdict

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        """What follows from the current part's path and from nothing else than is in the key; made once."""
        if self.verdict is not None:
            return self.verdict.derived.recall(key, make)
        return self._order.program.derived.recall((self._methods.path(self._part), key), make)

    @property
    def verified(self) -> bool:
        """Whether the run-time checks held in every part."""
        return self._methods.verified

    @property
    def verification(self) -> str | None:
        """When they were made, for the parts so far the least; None before."""
        return self._methods.verification

    def enter(self, part: Part) -> None:
        """Take up a part: find which of its rows belongs to which sample, and each parameter's method."""
        self._check_differentiable(part.outputs)
        self._part = part
        bound = self._bound  # not itself, which then would live until a cycle is looked for, and the graph with it
        self._of_loss = cache(lambda: part.rows(bound.gradient()))
        self._methods.enter(part, self._of_loss)
        self._columns = Columns(
            self._order, self._selected, self._methods, part, self._of_loss, self.kept_bytes, once=self._once
        )
        if any(r.extension.columns == "averaged" for r in self._order.requests):
            self._averaged = self._prepare_averaged()

    def leave(self) -> None:
        """Let go of the current part and its graph."""
        del self._part, self._columns, self._of_loss
        self._methods.leave()

    def tasks(self, store: ResultStore) -> list[Task]:
        """Every request's accumulator, new."""
        return [self._task(r, store) for r in self._order.requests if r.extension.accumulator is not None]

    def open(self, store: ResultStore, parts: int) -> int:
        """Get ready to compute `parts` parts into a store. How many columns there are in all."""
        self._tasks = self.tasks(store)
        residual = any(t.request.extension.residual is not None for t in self._tasks)
        first = any(t.request.extension.columns == "gradient" for t in self._tasks)
        averaged = any(t.request.extension.columns == "averaged" for t in self._tasks)
        per_part = first + self.columns["exact"] + self.columns["sampled"] + averaged
        self._total = parts * (per_part + (len(self._selected) if residual else 0))
        return self._total

    def compute(self) -> None:
        """Add the current part to every result."""
        shares = [share for task in self._tasks if (share := task.share(self._part)) is not None]
        first = [s for s in shares if s.columns == "gradient"]
        exact = [s for s in shares if s.columns == "exact"]
        sampled = [s for s in shares if s.columns == "sampled"]
        self._first_order(first)
        self._methods.at_hand = {}
        if exact:
            self._sweep(exact, range(self.columns["exact"]), *self._exact)
        self._draws(sampled)
        self._residuals([s for s in exact if s.request.extension.residual is not None])
        if self._averaged is not None:
            self._averaged.add_to([s.accumulator for s in shares if s.columns == "averaged"])
            self._advance()
        for share in shares:
            share.accumulator.stop()

    def gradient_contributions(self) -> dict[str, Contribution]:
        """Every parameter's individual gradients in the current part."""
        with torch.no_grad():
            return dict(self._columns.contributions(self._gradient))

    def layouts(self, labels: Sequence[str]) -> dict[str, Layout]:
        """Shapes and number formats of the tensors of some requests that are filled row by row."""
        found: dict[str, Layout] = {}
        for task in self.tasks(ResultStore()):
            if task.request.label in labels:
                found[task.request.label] = {
                    name: (
                        task.accumulator.result_shape(tuple(p.tensor.shape)),
                        accumulation_dtype(p.tensor.dtype),
                    )
                    for name, p in self._selected.items()
                }
        return found

    def fill(self, groups: dict[str, Group], store: ResultStore) -> None:
        """Put the results into the groups."""
        asked = [r.label for r in self._order.requests if r.extension.name == "grad"]
        for place, label in enumerate(asked):
            groups[label].by_parameter = {n: g.clone() if place else g for n, g in self._gradients.items()}
        for task in self._tasks:
            group, label = groups[task.request.label], task.request.label
            if label in store.files:
                group.file = store.files[label]
                group.by_parameter = group.tensors = store.files[label]
                group.missing = task.accumulator.missing
            else:
                fill(group, task.accumulator)

    def method(self, request: Request, key: str) -> str:
        """How a result came about: a parameter's method, or for several together the least of theirs."""
        if request.extension.residual is not None and key in self._elementwise:
            return "fallback"
        return self._methods.of(request, key)

    def verification_of(self, request: Request) -> str | None:
        """When the checks of what a result is made of were made; None where there were none."""
        return self._methods.verification_of(request)

    def contribution(self, name: str) -> Contribution:
        """A parameter's contribution with the shapes that it will have in the current part, and no numbers."""
        return self._columns.pattern(name)

    @property
    def kept_bytes(self) -> int:
        """What may be kept between columns."""
        if self._is_single:
            return 0
        whole = any(
            r.extension.accumulator is not None and r.extension.accumulator.keeps_windows for r in self._order.requests
        )
        needed = 0
        for prepared in (p for uses in self._methods.uses.values() for p in uses if p.tap.rule is not None):
            rule, role = prepared.tap.rule, prepared.use.role
            assert rule is not None
            elements = rule.unfolded_elements(role, prepared.saved)
            elements += rule.windows_elements(role, prepared.saved) if whole else 0
            needed += elements * accumulation_dtype(self._part.outputs.dtype).itemsize
        return min(self._order.budget.block_bytes, needed)

    @property
    def _is_single(self) -> bool:
        """Whether at most one column is reduced; that of the gradient may be wanted for `grad` alone."""
        reduced = any(r.extension.columns == "gradient" and r.extension.accumulator for r in self._order.requests)
        return self.columns["exact"] + self.columns["sampled"] + reduced <= 1

    @property
    def _once(self) -> bool:
        """Whether the one column is the last that goes back."""
        extensions = [r.extension for r in self._order.requests]
        further = any(e.residual is not None or e.columns == "averaged" for e in extensions)
        return self._is_single and not further

    def tap_bytes(self) -> int:
        """What the gradients at the current part's taps take, for one cotangent."""
        return sum(
            math.prod(shape) * accumulation_dtype(self._part.outputs.dtype).itemsize
            for tap in self._part.forward.tape.taps
            for shape in tap.shapes
        )

    def arranged_bytes(self) -> int:
        """What rearranged inputs of the taps take beside the inputs themselves."""
        known = {t.untyped_storage().data_ptr() for tap in self._part.forward.tape.taps for t in tap.saved}
        own = {
            s.untyped_storage().data_ptr(): s.untyped_storage().nbytes()
            for uses in self._methods.uses.values()
            for p in uses
            for s in p.saved
        }
        return sum(nbytes for place, nbytes in own.items() if place not in known)

    def waiting_bytes(self) -> int:
        """What is held at a time of the gradients at the current part's taps, for one cotangent."""
        return self._columns.waiting_bytes(self.tap_bytes())

    @property
    def tape(self) -> Tape:
        """Of the current part's forward pass."""
        return self._part.forward.tape

    @property
    def outputs(self) -> Tensor:
        """The current part's."""
        return self._part.outputs

    @staticmethod
    def _check_differentiable(outputs: Tensor) -> None:
        if not outputs.requires_grad:
            raise EngineError(
                "unsupported_model",
                "the outputs do not depend on any of the parameters asked for",
                param="model",
                remedy="check for no_grad, detach, or integer outputs in the model",
            )

    def _task(self, request: Request, store: ResultStore) -> Task:
        assert request.extension.accumulator is not None
        samples = chosen_samples(request, self._bound.N)
        N = self._bound.N if samples is None else len(samples)
        return Task(request, request.extension.accumulator(self._setting(request, N, store)), samples)

    def _setting(self, request: Request, N: int, store: ResultStore) -> Setting:
        sampled = request.extension.columns == "sampled"
        draws = int(request.options["mc_samples"]) if sampled else 1
        columns = self.columns["exact"] if request.extension.columns == "exact" else draws
        parameters = {name: p.tensor.detach() for name, p in self._selected.items()}
        block_bytes = self._order.budget.block_bytes
        return Setting(
            request.label,
            N,
            self._bound.Z,
            columns,
            draws,
            block_bytes,
            parameters,
            self._methods.uses,
            request.options,
            store,
            self._order.against.get(request.label),
            self._order.part is not None,
        )

    def _first_order(self, shares: list[Share]) -> None:
        """Take the loss's gradient, that of the whole where it is asked for, by one pass together."""
        if not any(r.extension.name == "grad" for r in self._order.requests):
            if shares:
                self._column(self._gradient, shares)
            return
        sums: dict[str, Tensor] = {}
        summed = self._columns.summed
        leaves = [t for name, p in self._selected.items() for t in p.tensors if name not in summed]
        taken = {t.untyped_storage().data_ptr() for t in [self._gradient, *leaves, *self._saved]}
        names = self._selected if shares else [name for name in self._selected if name in summed]
        take = self._taking(shares, summed, sums)
        further = bool(self.columns["exact"] or self.columns["sampled"])
        with torch.no_grad():
            gradients = self._columns.take_with_gradient(leaves, names, take, taken, further=further)
            if gradients is None:
                gradients = self._columns.ordinary_gradient(leaves, names, further=further)
                taken.update(g.untyped_storage().data_ptr() for g in self._methods.at_hand.values() if g is not None)
                for name, contribution in self._columns.contributions(self._gradient, names, further=further):
                    take(name, contribution)
        self._add_gradient(gradients, sums, taken)
        if shares:
            self._advance()

    @property
    def _saved(self) -> Iterator[Tensor]:
        return (t for tap in self._part.forward.tape.taps for t in tap.saved)

    def _add_gradient(self, gradients: list[Tensor | None], sums: Mapping[str, Tensor], taken: set[int]) -> None:
        """Add what came to the other parameters' tensors than those summed; `taken` is the memory of others."""
        for name, parameter in self._selected.items():
            if name in sums:
                total = sums[name]
            else:
                count = len(parameter.tensors)
                total = _sum_of(gradients[:count], parameter.tensor, taken)
                del gradients[:count]  # of which a copy may have been made
            self._gradients[name] = self._gradients[name] + total if name in self._gradients else total

    def _column(self, cotangent: Tensor, shares: list[Share]) -> None:
        with torch.no_grad():
            self._columns.take(cotangent, self._taking(shares))
        self._advance()

    @staticmethod
    def _taking(shares: list[Share], summed: Collection[str] = (), sums: dict[str, Tensor] | None = None) -> Take:
        """What has shares take contributions; of those summed, the sums over the samples come into `sums`."""
        # One that writes gradients out comes first, so that the others find theirs made.
        shares = sorted(shares, key=lambda share: not share.accumulator.writes)
        expected = expected_of(shares)

        def take(name: str, contribution: Contribution) -> None:
            contribution.expect({**expected, "total": expected["total"] + 1} if name in summed else expected)
            for share in shares:
                share.take(name, contribution)
            if sums is not None and name in summed:
                sums[name] = contribution.total()

        return take

    @property
    def _exact(self) -> tuple[One, Several]:
        """What makes exact columns."""
        bound = self._bound
        return (bound.root_column, bound.root_columns) if self._any_root else (bound.exact_column, bound.exact_columns)

    def _draws(self, shares: list[Share]) -> None:
        """Take sampled columns: those for the same requests together."""
        seed, bound, first = self._order.seed, self._bound, 0
        one, several = partial(bound.sampled_column, seed), partial(bound.sampled_columns, seed)
        for stop in sorted({share.accumulator.setting.draws for share in shares}):
            takers = [share for share in shares if share.accumulator.setting.draws >= stop]
            if stop - first == 1:
                self._column(self._part.rows(one(first)), takers)
            else:
                self._sweep(takers, range(first, stop), one, several)
            first = stop

    def _sweep(self, shares: list[Share], numbers: range, one: One, several: Several) -> None:
        """Take columns of some numbers, several at once where that is faster."""
        size = min(len(numbers), self._columns.together)
        for first in numbers[::size]:
            if not self._columns.stretches:
                self._column(self._part.rows(one(first)), shares)
            else:
                columns = several(first, min(numbers.stop, first + size))
                with torch.no_grad():
                    send(self._part.rows_of_several(columns), self._columns, self._selected, shares, self._advance)

    def _advance(self) -> None:
        self._done += 1
        if self._order.progress is not None:
            self._order.progress(self._done, self._total)

    def _residuals(self, shares: list[Share]) -> None:
        """What the model's second derivatives add to the diagonals of the Hessian."""
        if not shares:
            return
        residuals = Residuals(self._part.outputs, self._gradient, self._order.budget.block_bytes)
        per_sample = any(s.request.extension.residual == "per sample" or s.samples is not None for s in shares)
        bends = find_bends(
            self._part.outputs, self._gradient, [u for uses in self._methods.uses.values() for u in uses]
        )
        for name, parameter in self._selected.items():
            uses = self._methods.uses.get(name)
            taps = [] if uses is None else [u.tap_index for u in uses]
            if uses is None or not affine(uses) or not bends.strays.isdisjoint(taps):
                self._elementwise.add(name)
                blocks = residuals.of_tensors(parameter.tensors, per_sample=per_sample)
            elif bends.curved.isdisjoint(taps):
                blocks = iter(())
            else:
                blocks = residuals.of_uses(uses, parameter.tensor)
            for first, block in blocks:
                for share in shares:
                    share.take_residual(name, first, block.detach())
            self._advance()

    def _prepare_averaged(self) -> AveragedFactors:
        """Find the way along which one matrix goes back to the layers."""
        tape, outputs = self._part.forward.tape, self._part.outputs
        assert tape.links is not None
        reached, nothing = reached_edges(outputs), outputs.new_zeros(())
        taps = {u.tap_index: u.tap for uses in self._methods.uses.values() for u in uses}
        shapes = {i: nothing.expand(t.shapes[0]) if edge_key(t.edges[0]) in reached else None for i, t in taps.items()}
        arranged: dict[int, Tensor] = {}
        contributions = {
            name: self._columns.closed(name, parameter, shapes, arranged)
            if name in self._methods.uses
            else self.contribution(name)
            for name, parameter in self._selected.items()
        }

        def formed() -> frozenset[str]:
            tasks = [t.accumulator for t in self.tasks(ResultStore()) if t.request.extension.columns == "averaged"]
            return frozenset(n for n, c in contributions.items() if any(a.obstacle(n, c) is None for a in tasks))

        assert self.verdict is not None
        names = self.recall(("formed", self.kind), formed)
        budget = self._order.budget
        return AveragedFactors(outputs, self._bound, tape.links, contributions, names, budget, self.verdict)


def _sum_of(gradients: Sequence[Tensor | None], like: Tensor, taken: set[int]) -> Tensor:
    """The sum of what came to a parameter's tensors, in a tensor of its own: `taken` is the memory of others."""
    dtype = accumulation_dtype(like.dtype)
    found = [g for g in gradients if g is not None]
    if len(found) == 1 and found[0].dtype == dtype and found[0].is_contiguous():
        memory = found[0].untyped_storage()
        # A matrix product's comes as a view of another shape, of memory that is nobody else's all the same.
        if memory.data_ptr() not in taken and memory.nbytes() == found[0].nbytes:
            taken.add(memory.data_ptr())
            whole = found[0]
            if not whole._is_view() or speculates():  # a replay makes views, too
                return whole
            return whole.new_empty(0).set_(memory, 0, whole.shape, whole.stride())
    if not found:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    total = pages.copied(found[0].to(dtype))
    for gradient in found[1:]:
        total += gradient
    return total


def _count_columns(requests: Sequence[Request], exact: int) -> dict[str, int]:
    wanted = {r.extension.columns for r in requests}
    draws = [int(r.options["mc_samples"]) for r in requests if r.extension.columns == "sampled"]
    return {
        "gradient": int("gradient" in wanted),
        "exact": exact,
        "sampled": max(draws, default=0),
    }
