"""Backward passes to the taps: one for the loss's gradient, one per column of the square root of its Hessian.

Each is reduced by every extension that asked for it before the next is made. The samples come in one part, or in
several, each with a forward pass of its own; the loss is always that of the whole batch.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature_engine.averaged_factors import AveragedFactors
from curvature_engine.budget import Budget
from curvature_engine.contributions import (
    Absent,
    ClosedForm,
    Contribution,
    Fallback,
    Materialised,
    PreparedUse,
    Relief,
    prepare_use,
)
from curvature_engine.errors import EngineError
from curvature_engine.extensions import WHOLE, Accumulator, Against, Setting
from curvature_engine.judgement import confirm, judge, random_cotangent, reproducible, uses_by_parameter
from curvature_engine.losses import BoundLoss
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Code, Verdict
from curvature_engine.program import Forward, Parameter, Program
from curvature_engine.requests import Request
from curvature_engine.residuals import Residuals, affine, find_strays
from curvature_engine.results import Group
from curvature_engine.stores import Layout, ResultStore
from curvature_engine.tape import backward
from curvature_engine.verification import EVERY_COLUMN, KEPT_VERDICT, THIS_JOB, Verification, least
from curvature_engine.version import __version__
from curvature_engine.watched import Derivation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """What was asked of one program, and what is noticed on the way."""

    program: Program
    requests: list[Request]
    seed: int
    progress: Progress | None
    budget: Budget
    verify: bool = False
    warnings: list[str] = field(default_factory=list)
    against: dict[str, Against] = field(default_factory=dict)
    """By label: the other batches of requests that name one."""
    relief: Relief = field(default_factory=Relief)
    judged: set[Hashable] = field(default_factory=set)
    """Paths whose kept verdicts are this order's own, from an earlier part, another batch or a failed attempt."""


@dataclass(frozen=True)
class Part:
    """Samples `start` … `stop` of the batch, and their forward pass."""

    forward: Forward
    outputs: Tensor
    start: int
    stop: int

    @property
    def n(self) -> int:
        """How many samples."""
        return self.stop - self.start


@dataclass(frozen=True)
class Task:
    """One request's accumulator, and the samples of the batch that it takes (None for all)."""

    request: Request
    accumulator: Accumulator
    samples: Sequence[int] | None

    def share(self, part: Part) -> "Share | None":
        """What it takes of a part; None where that is nothing."""
        if self.samples is None:
            self.accumulator.start(range(part.start, part.stop))
            return Share(self.request, self.accumulator, None)
        rows = [row for row, n in enumerate(self.samples) if part.start <= n < part.stop]
        if not rows:
            return None
        self.accumulator.start(rows)
        chosen = [self.samples[row] - part.start for row in rows]
        return Share(self.request, self.accumulator, torch.tensor(chosen, device=part.outputs.device))


@dataclass(frozen=True)
class Share:
    """What a request takes of one part: some of its samples, counted from its first, or None for all."""

    request: Request
    accumulator: Accumulator
    samples: Tensor | None

    @property
    def columns(self) -> str:
        """What is propagated back for it."""
        return self.request.extension.columns

    def take(self, parameter: str, contribution: Contribution) -> None:
        """Take one column's contribution of one parameter."""
        chosen = contribution if self.samples is None else contribution.select(self.samples)
        self.accumulator.add(parameter, chosen)

    def take_residual(self, parameter: str, first: int, block: Tensor) -> None:
        """Take the residual's diagonals of samples from `first` on, [n, *p]."""
        if self.samples is None:
            self.accumulator.add_residual(parameter, first, block)
            return
        for place, n in enumerate(self.samples.tolist()):
            if first <= n < first + len(block):
                self.accumulator.add_residual(parameter, place, block[n - first][None])


class BackwardPasses:
    """The backward passes of one request.

    Attributes:
        methods: parameter → "closed form" or "fallback"; of several parts the least.
        uses: of parameters with closed forms in the current part, by name.
        columns: how many columns of each kind are wanted.
        verified: whether the run-time checks held in every part.
        verification: when they were made, for the parts so far the least; None before.
    """

    def __init__(self, order: Order, bound: BoundLoss, selected: dict[str, Parameter]) -> None:
        self._order = order
        self._bound = bound
        self._selected = selected
        self._part: Part
        self._gradient: Tensor
        self._at_hand: dict[int, Tensor | None] = {}
        self._fallen: set[str] = set()
        self._elementwise: set[str] = set()
        self._averaged: AveragedFactors | None = None
        self._gradients: dict[str, Tensor] = {}
        self._tasks: list[Task] = []
        self._done, self._total = 0, 0
        self.uses: dict[str, list[PreparedUse]] = {}
        self.methods: dict[str, str] = {}
        self.columns = _count_columns(order.requests, bound)
        self.verified = True
        self.verification: str | None = None

    def enter(self, part: Part) -> None:
        """Take up a part: find which of its rows belongs to which sample, and each parameter's method."""
        self._check_differentiable(part.outputs)
        self._part = part
        self._gradient = self._rows(self._bound.gradient())
        self._at_hand = {}
        if any(r.extension.accumulator is not None for r in self._order.requests):
            self._prepare()
        else:
            self.verified = False
        if any(r.extension.columns == "averaged" for r in self._order.requests):
            self._averaged = self._prepare_averaged()

    def leave(self) -> None:
        """Let go of the current part and its graph."""
        del self._part
        self.uses.clear()
        self._at_hand = {}

    def tasks(self, store: ResultStore) -> list[Task]:
        """Every request's accumulator, new."""
        return [self._task(r, store) for r in self._order.requests if r.extension.accumulator is not None]

    def open(self, store: ResultStore, parts: int) -> None:
        """Get ready to compute `parts` parts into a store."""
        self._tasks = self.tasks(store)
        residual = any(t.request.extension.residual is not None for t in self._tasks)
        first = any(t.request.extension.columns == "gradient" for t in self._tasks)
        averaged = any(t.request.extension.columns == "averaged" for t in self._tasks)
        per_part = first + self.columns["exact"] + self.columns["sampled"] + averaged
        self._total = parts * (per_part + (len(self._selected) if residual else 0))

    def compute(self) -> None:
        """Add the current part to every result."""
        self._add_gradient()
        shares = [share for task in self._tasks if (share := task.share(self._part)) is not None]
        first = [s for s in shares if s.columns == "gradient"]
        exact = [s for s in shares if s.columns == "exact"]
        sampled = [s for s in shares if s.columns == "sampled"]
        if first:
            self._column(self._gradient, first)
        for v in range(self.columns["exact"] if exact else 0):
            self._column(self._rows(self._bound.exact_column(v)), exact)
        for m in range(self.columns["sampled"] if sampled else 0):
            column = self._rows(self._bound.sampled_column(self._order.seed, m))
            self._column(column, [s for s in sampled if m < s.accumulator.setting.draws])
        self._residuals([s for s in exact if s.request.extension.residual is not None])
        if self._averaged is not None:
            self._averaged.add_to([s.accumulator for s in shares if s.columns == "averaged"])
            self._advance()

    def gradient_contributions(self) -> dict[str, Contribution]:
        """Every parameter's individual gradients in the current part."""
        with torch.no_grad():
            return dict(self._contributions(self._gradient))

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
        for request in self._order.requests:
            if request.extension.name == "grad":
                groups[request.label].by_parameter = dict(self._gradients)
        for task in self._tasks:
            group, label = groups[task.request.label], task.request.label
            if label in store.files:
                group.file = store.files[label]
                group.by_parameter = group.tensors = store.files[label]
                group.missing = task.accumulator.missing
            else:
                _fill(group, task.accumulator)

    def method(self, request: Request, key: str) -> str:
        """How a result came about: a parameter's method, or for several together the least of theirs."""
        if request.extension.residual is not None and key in self._elementwise:
            return "fallback"
        against = self._order.against.get(request.label)
        found: set[str] = set()
        for methods in (self.methods, {} if against is None else against.work.methods):
            found.update([methods[key]] if key in methods else methods.values())
        return "fallback" if "fallback" in found else "closed form"

    def verification_of(self, request: Request) -> str | None:
        """When the checks of what a result is made of were made; None where there were none.

        The columns' sums are what `verify` compares: not what comes of one backward pass as it is, not the matrices
        averaged over samples, not the second derivatives of the model.
        """
        against = self._order.against.get(request.label)
        found = least([self.verification, *([] if against is None else [against.work.verification])])
        extension = request.extension
        compared = (
            extension.accumulator is not None
            and extension.columns in ("gradient", "exact", "sampled")
            and extension.residual is None
        )
        return THIS_JOB if found == EVERY_COLUMN and not compared else found

    def contribution(self, name: str) -> Contribution:
        """A parameter's contribution with the shapes that it will have in the current part, and no numbers."""
        parameter, n = self._selected[name], self._part.n
        if name not in self.uses:
            return Fallback(self._part.outputs, parameter.tensors, self._part.outputs.new_zeros(()).expand(n))
        uses = []
        for prepared in self.uses[name]:
            g = prepared.arranged_gradient(self._part.outputs.new_zeros(()).expand(prepared.tap.shapes[0]))
            uses.append((prepared, g))
        if not uses:
            return Absent(parameter.tensor, n)
        return ClosedForm(uses, parameter.tensor, n, self._order.budget.block_bytes)

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
            for uses in self.uses.values()
            for p in uses
            for s in p.saved
        }
        return sum(nbytes for place, nbytes in own.items() if place not in known)

    def probe_digits(self) -> int:
        """How many cotangents tell the current part's samples apart."""
        return len(Code(self._part.n, 64).factors(torch.device("cpu")))

    def _rows(self, column: Tensor) -> Tensor:
        """The current part's rows of a column of the whole batch."""
        return column[self._part.start : self._part.stop].to(self._part.outputs.dtype)

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
        samples = self._samples(request)
        N = self._bound.N if samples is None else len(samples)
        return Task(request, request.extension.accumulator(self._setting(request, N, store)), samples)

    def _samples(self, request: Request) -> Sequence[int] | None:
        """The samples that a request picks; None for all.

        Raises:
            EngineError: `invalid_option` where the batch has no such sample.
        """
        indices = request.options.get("subsampling")
        if indices is None:
            return None
        N = self._bound.N
        if beyond := [n for n in indices if n >= N]:
            raise EngineError(
                "invalid_option",
                f"{request.label}'s subsampling names sample {beyond[0]}; the batch has {N} (0 … {N - 1})",
                param=f"{request.extension.name}.subsampling",
                remedy="name samples of this batch",
            )
        return list(indices)

    def _setting(self, request: Request, N: int, store: ResultStore) -> Setting:
        sampled = request.extension.columns == "sampled"
        draws = int(request.options["mc_samples"]) if sampled else 1
        columns = self._bound.columns if request.extension.columns == "exact" else draws
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
            self.uses,
            request.options,
            store,
            self._order.against.get(request.label),
        )

    def _add_gradient(self) -> None:
        if not any(r.extension.name == "grad" for r in self._order.requests):
            return
        leaves = [t for p in self._selected.values() for t in p.tensors]
        gradients = backward(self._part.outputs, leaves, self._gradient)
        place = 0
        for name, parameter in self._selected.items():
            total = torch.zeros(
                parameter.tensor.shape, dtype=accumulation_dtype(parameter.tensor.dtype), device=parameter.tensor.device
            )
            for gradient in gradients[place : place + len(parameter.tensors)]:
                if gradient is not None:
                    total += gradient
            place += len(parameter.tensors)
            self._gradients[name] = self._gradients[name] + total if name in self._gradients else total

    # The verdict on this path, and each parameter's method

    def _prepare(self) -> None:
        verdict = self._verdict()
        by_parameter = uses_by_parameter(self._part.forward.tape, verdict.taps)
        self.uses.clear()
        for name in self._selected:
            uses = by_parameter.get(name, ())
            closed = all(
                tap.rule is not None and tap.intact and verdict.taps[i].attribution is not None for i, tap, _ in uses
            )
            derived = any(isinstance(use.watched.index, Derivation) for *_, use in uses)
            if name in verdict.mismatched and uses and closed and not derived:
                raise EngineError(
                    "verification_failed",
                    f"the closed form of parameter {name} disagrees with ordinary autograd; no result is given",
                    param=name,
                    remedy="please report this model",
                )
            if not closed or name in verdict.mismatched:
                self._fallen.add(name)
            self.methods[name] = "fallback" if name in self._fallen else "closed form"
            if name in self._fallen:
                continue
            prepared = []
            for i, tap, use in uses:
                attribution = verdict.taps[i].attribution
                assert attribution is not None
                prepared.append(prepare_use(tap, i, use, attribution))
            self.uses[name] = prepared

    def _verdict(self) -> Verdict:
        verdicts, forward, outputs = self._order.program.verdicts, self._part.forward, self._part.outputs
        path = self._path()
        verdict = None if forward.routed_by_data or self._order.verify else verdicts.get(path)
        found = THIS_JOB if path in self._order.judged else KEPT_VERDICT
        if verdict is None or not self._confirm(verdict):
            verdict = judge(outputs, forward.tape, self._selected)
            found = EVERY_COLUMN if self._order.verify else THIS_JOB
            if verdict.finite and verdict.confirmable and not forward.routed_by_data:
                verdicts.keep(path, verdict)
                self._order.judged.add(path)
        self.verification = found if self.verification is None else least([self.verification, found])
        self.verified = self.verified and verdict.finite and bool(torch.isfinite(outputs).all())
        if not verdict.finite:
            self._distrust()
        return verdict

    def _path(self) -> Hashable:
        """What a verdict holds for: this program, which keeps it, in this version, on such a device, inputs and way."""
        forward, outputs = self._part.forward, self._part.outputs
        return (
            __version__,
            outputs.device.type,
            forward.signature,
            (tuple(outputs.shape), outputs.dtype),
            forward.decisions,
            tuple(self._selected),
            tuple((tap.name, tap.shapes, tap.intact, tuple(t.dtype for t in tap.saved)) for tap in forward.tape.taps),
        )

    def _confirm(self, verdict: Verdict) -> bool:
        """Whether a kept verdict holds for this batch's rows."""
        # The loss's gradient leaves rows silent that other columns reach, but those do not matter to it, except among
        # the inputs of Kronecker factors.
        extensions = [r.extension for r in self._order.requests]
        only_gradient = all(e.columns in ("outputs", "gradient") and e.kind != "factors" for e in extensions)
        outputs = self._part.outputs
        cotangent = self._gradient if only_gradient else random_cotangent(outputs)
        known = [i for i, tap in enumerate(verdict.taps) if tap.attribution is not None]
        with reproducible(outputs.device):
            gradients = self._at_taps(known, cotangent)
            if only_gradient:
                self._at_hand = gradients
            return confirm(verdict, outputs, self._part.forward.tape, cotangent, gradients)

    # Columns

    def _column(self, cotangent: Tensor, shares: list[Share]) -> None:
        with torch.no_grad():
            for name, contribution in self._contributions(cotangent):
                for share in shares:
                    share.take(name, contribution)
        self._advance()

    def _contributions(self, cotangent: Tensor) -> Iterator[tuple[str, Contribution]]:
        """Every parameter's contribution under a cotangent."""
        needed = sorted({u.tap_index for uses in self.uses.values() for u in uses})
        at_hand = self._at_hand if cotangent is self._gradient else {}
        gradients = at_hand if at_hand.keys() >= set(needed) else self._at_taps(needed, cotangent)
        fallbacks = self._fallbacks(cotangent)
        verification = Verification(self._part.outputs, self._selected, cotangent) if self._order.verify else None
        for name, parameter in self._selected.items():
            contribution = fallbacks.get(name) or self._closed(name, parameter, gradients)
            if verification is not None:
                verification.check(name, contribution)
            yield name, contribution
        if verification is not None and not verification.finite:
            self._distrust()

    def _distrust(self) -> None:
        self.verified = False
        warning = "some gradient in the model is not finite: results below it are not verified"
        if warning not in self._order.warnings:
            self._order.warnings.append(warning)

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
        strays = find_strays(self._part.outputs, self._gradient, [u for uses in self.uses.values() for u in uses])
        for name, parameter in self._selected.items():
            uses = self.uses.get(name)
            if uses is None or not affine(uses) or not strays.isdisjoint(u.tap_index for u in uses):
                self._elementwise.add(name)
                blocks = residuals.of_tensors(parameter.tensors, per_sample=per_sample)
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
        numbers = sorted({u.tap_index for uses in self.uses.values() for u in uses})
        reached = self._at_taps(numbers, random_cotangent(outputs))
        contributions = {
            name: self._closed(name, parameter, reached) if name in self.uses else self.contribution(name)
            for name, parameter in self._selected.items()
        }
        tasks = [t.accumulator for t in self.tasks(ResultStore()) if t.request.extension.columns == "averaged"]
        return AveragedFactors(outputs, self._bound, tape.links, contributions, tasks, self._order.budget)

    def _at_taps(self, numbers: Sequence[int], cotangent: Tensor) -> dict[int, Tensor | None]:
        """The gradients of some taps' outputs, by the taps' numbers."""
        taps = [self._part.forward.tape.taps[i] for i in numbers]
        found = backward(self._part.outputs, [tap.edges[0] for tap in taps], cotangent)
        return {i: tap.shaped([g])[0] for i, tap, g in zip(numbers, taps, found, strict=True)}

    def _closed(self, name: str, parameter: Parameter, gradients: dict[int, Tensor | None]) -> Contribution:
        uses = []
        for prepared in self.uses[name]:
            g = gradients[prepared.tap_index]
            if g is not None:
                uses.append((prepared, prepared.arranged_gradient(g)))
        if not uses:
            return Absent(parameter.tensor, self._part.n)
        return ClosedForm(uses, parameter.tensor, self._part.n, self._order.budget.block_bytes, self._order.relief)

    def _fallbacks(self, cotangent: Tensor) -> dict[str, Contribution]:
        """Per-sample gradients of the parameters without closed form: together where they fit the budget."""
        names = [n for n, method in self.methods.items() if method == "fallback"]
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


def _count_columns(requests: Sequence[Request], bound: BoundLoss) -> dict[str, int]:
    wanted = {r.extension.columns for r in requests}
    draws = [int(r.options["mc_samples"]) for r in requests if r.extension.columns == "sampled"]
    return {
        "gradient": int("gradient" in wanted),
        "exact": bound.columns if "exact" in wanted else 0,
        "sampled": max(draws, default=0),
    }


def _fill(group: Group, accumulator: Accumulator) -> None:
    found = accumulator.finish()
    group.missing = accumulator.missing
    if group.kind != "tensor":
        group.by_parameter = found
        return
    whole = found[WHOLE]
    assert isinstance(whole, Tensor)
    group.tensors[group.label] = whole
