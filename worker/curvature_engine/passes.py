"""Backward passes to the taps: one for the loss's gradient, one per column of the square root of its Hessian.

Each is reduced by every extension that asked for it before the next is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvature_engine.contributions import (
    Absent,
    ClosedForm,
    Contribution,
    Fallback,
    Materialised,
    PreparedUse,
    prepare_use,
)
from curvature_engine.errors import EngineError
from curvature_engine.extensions import WHOLE, Accumulator, Extension, Setting
from curvature_engine.judgement import confirm, judge, random_cotangent, reproducible
from curvature_engine.losses import BoundLoss
from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Verdict
from curvature_engine.program import Forward, Parameter, Program
from curvature_engine.requests import Request
from curvature_engine.residuals import Residuals, feed_each_other
from curvature_engine.results import Group
from curvature_engine.tape import backward

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Order:
    """What was asked of one program, and what is noticed on the way."""

    program: Program
    requests: list[Request]
    seed: int
    progress: Progress | None
    budget_bytes: int
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One request's accumulator, and the samples that it takes (None for all)."""

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
        methods: parameter → "closed form" or "fallback".
        verified: whether the run-time checks held.
    """

    def __init__(
        self, order: Order, forward: Forward, outputs: Tensor, bound: BoundLoss, selected: dict[str, Parameter]
    ) -> None:
        self._order = order
        self._forward = forward
        self._outputs = outputs
        self._bound = bound
        self._selected = selected
        self._gradient = bound.gradient().to(outputs.dtype)
        self._at_hand: dict[int, Tensor | None] = {}
        self._uses: dict[str, list[PreparedUse]] = {}
        self._elementwise: set[str] = set()
        self._done, self._total = 0, 0
        self.methods: dict[str, str] = {}
        self.verified = False

    def compute(self, groups: dict[str, Group]) -> None:
        """Fill the groups of all extensions that need a backward pass."""
        self._check_differentiable()
        tasks = [self._task(r) for r in self._order.requests if r.extension.accumulator is not None]
        if tasks:
            self._prepare()
        self._fill_gradient(groups)
        first = [t for t in tasks if t.columns == "gradient"]
        exact = [t for t in tasks if t.columns == "exact"]
        sampled = [t for t in tasks if t.columns == "sampled"]
        draws = max((t.accumulator.setting.draws for t in sampled), default=0)
        residual = [t for t in exact if t.request.extension.residual is not None]
        self._total = bool(first) + (self._bound.columns if exact else 0) + draws
        self._total += len(self._selected) if residual else 0
        if first:
            self._column(self._gradient, first)
        for v in range(self._bound.columns if exact else 0):
            self._column(self._bound.exact_column(v), exact)
        for m in range(draws):
            column = self._bound.sampled_column(self._order.seed, m)
            self._column(column, [t for t in sampled if m < t.accumulator.setting.draws])
        self._residuals(residual)
        for task in tasks:
            _fill(groups[task.request.label], task.accumulator)

    def method(self, extension: Extension, key: str) -> str:
        """How a result came about: a parameter's method, or for several together the least of theirs."""
        if extension.residual is not None and key in self._elementwise:
            return "fallback"
        if key in self.methods:
            return self.methods[key]
        return "fallback" if "fallback" in self.methods.values() else "closed form"

    def _check_differentiable(self) -> None:
        if not self._outputs.requires_grad:
            raise EngineError(
                "unsupported_model",
                "the outputs do not depend on any of the parameters asked for",
                param="model",
                remedy="check for no_grad, detach, or integer outputs in the model",
            )

    def _task(self, request: Request) -> Task:
        assert request.extension.accumulator is not None
        samples = self._samples(request)
        N = self._bound.N if samples is None else len(samples)
        return Task(request, request.extension.accumulator(self._setting(request, N)), samples)

    def _samples(self, request: Request) -> Tensor | None:
        """The samples that a request picks, [n]; None for all.

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
        return torch.tensor(indices, device=self._outputs.device)

    def _setting(self, request: Request, N: int) -> Setting:
        sampled = request.extension.columns == "sampled"
        draws = int(request.options["mc_samples"]) if sampled else 1
        columns = self._bound.columns if request.extension.columns == "exact" else draws
        parameters = {name: p.tensor.detach() for name, p in self._selected.items()}
        return Setting(
            N, self._bound.Z, columns, draws, self._order.budget_bytes, parameters, self._uses, request.options
        )

    def _fill_gradient(self, groups: dict[str, Group]) -> None:
        labels = [r.label for r in self._order.requests if r.extension.name == "grad"]
        if not labels:
            return
        leaves = [t for p in self._selected.values() for t in p.tensors]
        gradients = backward(self._outputs, leaves, self._gradient)
        place = 0
        for name, parameter in self._selected.items():
            total = torch.zeros(
                parameter.tensor.shape, dtype=accumulation_dtype(parameter.tensor.dtype), device=parameter.tensor.device
            )
            for gradient in gradients[place : place + len(parameter.tensors)]:
                if gradient is not None:
                    total += gradient
            place += len(parameter.tensors)
            for label in labels:
                groups[label].by_parameter[name] = total

    # The verdict on this path, and each parameter's method

    def _prepare(self) -> None:
        verdict = self._verdict()
        taps = self._forward.tape.taps
        for name in self._selected:
            uses = [(i, tap, use) for i, tap in enumerate(taps) for use in tap.uses if use.watched.parameter == name]
            closed = all(
                tap.rule is not None and tap.intact and verdict.taps[i].attribution is not None for i, tap, _ in uses
            )
            if name in verdict.mismatched and uses and closed:
                raise EngineError(
                    "verification_failed",
                    f"the closed form of parameter {name} disagrees with ordinary autograd; no result is given",
                    param=name,
                    remedy="please report this model",
                )
            if not closed or name in verdict.mismatched:
                self.methods[name] = "fallback"
                continue
            self.methods[name] = "closed form"
            prepared = []
            for i, tap, use in uses:
                attribution = verdict.taps[i].attribution
                assert attribution is not None
                prepared.append(prepare_use(tap, i, use, attribution))
            self._uses[name] = prepared

    def _verdict(self) -> Verdict:
        verdicts, forward, outputs = self._order.program.verdicts, self._forward, self._outputs
        path = (
            tuple(outputs.shape),
            forward.decisions,
            tuple(self._selected),
            tuple((tap.name, tap.shapes, tap.intact) for tap in forward.tape.taps),
        )
        verdict = None if forward.routed_by_data else verdicts.get(path)
        if verdict is None or not self._confirm(verdict):
            verdict = judge(outputs, forward.tape, self._selected)
            if verdict.finite and verdict.confirmable and not forward.routed_by_data:
                verdicts.keep(path, verdict)
        self.verified = verdict.finite and bool(torch.isfinite(outputs).all())
        if not verdict.finite:
            self._order.warnings.append("some gradient in the model is not finite: results below it are not verified")
        return verdict

    def _confirm(self, verdict: Verdict) -> bool:
        """Whether a kept verdict holds for this batch's rows."""
        # The loss's gradient leaves rows silent that other columns reach, but those do not matter to it, except among
        # the inputs of Kronecker factors.
        extensions = [r.extension for r in self._order.requests]
        only_gradient = all(e.columns in ("outputs", "gradient") and e.kind != "factors" for e in extensions)
        cotangent = self._gradient if only_gradient else random_cotangent(self._outputs)
        known = [i for i, tap in enumerate(verdict.taps) if tap.attribution is not None]
        with reproducible(self._outputs.device):
            gradients = self._at_taps(known, cotangent)
            if only_gradient:
                self._at_hand = gradients
            return confirm(verdict, self._outputs, self._forward.tape, cotangent, gradients)

    # Columns

    def _column(self, cotangent: Tensor, tasks: list[Task]) -> None:
        cotangent = cotangent.to(self._outputs.dtype)
        needed = sorted({u.tap_index for uses in self._uses.values() for u in uses})
        at_hand = self._at_hand if cotangent is self._gradient else {}
        gradients = at_hand if at_hand.keys() >= set(needed) else self._at_taps(needed, cotangent)
        fallbacks = self._fallbacks(cotangent)
        with torch.no_grad():
            for name, parameter in self._selected.items():
                contribution = fallbacks.get(name) or self._closed(name, parameter, gradients)
                for task in tasks:
                    task.take(name, contribution)
        self._advance()

    def _advance(self) -> None:
        self._done += 1
        if self._order.progress is not None:
            self._order.progress(self._done, self._total)

    def _residuals(self, tasks: list[Task]) -> None:
        """What the model's second derivatives add to the diagonals of the Hessian."""
        if not tasks:
            return
        residuals = Residuals(self._outputs, self._gradient, self._order.budget_bytes)
        per_sample = any(t.request.extension.residual == "per sample" or t.samples is not None for t in tasks)
        for name, parameter in self._selected.items():
            uses = self._uses.get(name)
            if uses is None or feed_each_other(uses):
                self._elementwise.add(name)
                blocks = residuals.of_tensors(parameter.tensors, per_sample=per_sample)
            else:
                blocks = residuals.of_uses(uses, parameter.tensor)
            for first, block in blocks:
                for task in tasks:
                    task.take_residual(name, first, block.detach())
            self._advance()

    def _at_taps(self, numbers: Sequence[int], cotangent: Tensor) -> dict[int, Tensor | None]:
        """The gradients of some taps' outputs, by the taps' numbers."""
        taps = [self._forward.tape.taps[i] for i in numbers]
        found = backward(self._outputs, [tap.edges[0] for tap in taps], cotangent)
        return {i: tap.shaped([g])[0] for i, tap, g in zip(numbers, taps, found, strict=True)}

    def _closed(self, name: str, parameter: Parameter, gradients: dict[int, Tensor | None]) -> Contribution:
        uses = []
        for prepared in self._uses[name]:
            g = gradients[prepared.tap_index]
            if g is not None:
                uses.append((prepared, prepared.arranged_gradient(g)))
        if not uses:
            return Absent(parameter.tensor, self._bound.N)
        return ClosedForm(uses, parameter.tensor, self._bound.N, self._order.budget_bytes)

    def _fallbacks(self, cotangent: Tensor) -> dict[str, Contribution]:
        """Per-sample gradients of the parameters without closed form: together where they fit the budget."""
        names = [n for n, method in self.methods.items() if method == "fallback"]
        if not names:
            return {}
        N = self._bound.N
        tensors = {n: self._selected[n].tensors for n in names}
        size = sum(t[0].numel() * 8 * N for t in tensors.values())
        if size > self._order.budget_bytes:
            return {n: Fallback(self._outputs, tensors[n], cotangent) for n in names}
        flat = [t for n in names for t in tensors[n]]
        stacks = [torch.zeros((N, *t.shape), dtype=accumulation_dtype(t.dtype), device=t.device) for t in flat]
        restricted = torch.zeros_like(cotangent)
        for n in range(N):
            restricted[n] = cotangent[n]
            found = backward(self._outputs, flat, restricted)
            restricted[n] = 0
            for stack, gradient in zip(stacks, found, strict=True):
                if gradient is not None:
                    stack[n] = gradient
        result: dict[str, Contribution] = {}
        for name in names:
            parts = [stacks.pop(0) for _ in tensors[name]]
            result[name] = Materialised(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return result


def _fill(group: Group, accumulator: Accumulator) -> None:
    found = accumulator.finish()
    group.missing = accumulator.missing
    if group.kind != "tensor":
        group.by_parameter = found
        return
    whole = found[WHOLE]
    assert isinstance(whole, Tensor)
    group.tensors[group.label] = whole
