"""What comes before the first column: forward pass, division into chunks, the loss, the probe, the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvature_engine.alone import check_part
from curvature_engine.chain import Links
from curvature_engine.division import Divider, Division, same_rows
from curvature_engine.errors import EngineError, TooLarge
from curvature_engine.execution import tensors_in
from curvature_engine.few import FEW, MOST_ROUNDS, FewSamples, can_be_few
from curvature_engine.losses import BoundLoss, LossSpec
from curvature_engine.methods import path_of
from curvature_engine.orders import Order
from curvature_engine.parts import path_digest, whole_batch_required
from curvature_engine.passes import BackwardPasses
from curvature_engine.planner import Planner, gradient_bytes, probed_bytes
from curvature_engine.plans import Plan, size
from curvature_engine.program import Forward, Inputs, Parameter
from curvature_engine.tape import Tape
from curvature_engine.tasks import Part

_PROBED = 2
"""The fewest samples that the probe can tell apart."""


@dataclass(frozen=True)
class Limits:
    """How far a batch is divided beyond what the budget asks, once memory has run out.

    Attributes:
        samples: the most that a chunk may hold; None where the budget alone decides.
        least: the fewest.
    """

    samples: int | None = None
    least: int = _PROBED


class Preparer:
    """Prepares batches of one order."""

    def __init__(self, order: Order, spec: LossSpec, selected: dict[str, Parameter]) -> None:
        self.order, self.spec, self.selected = order, spec, selected

    def prepare(self, inputs: Inputs, targets: Tensor, limits: Limits) -> "Prepared":
        """Everything up to the first column; the first chunk's graph is at hand then."""
        if not self.needs_backward:
            forward = self._forward(inputs, graph=False)
            division = Division(_one(self._select(forward)), forward.kept_bytes)
            return self._prepared(inputs, targets, forward, division, None)
        few = self._few(inputs, limits)
        if limits.samples is None:
            fitting = self._fitting(inputs, few)
            if fitting is not None:
                division = Division(_one(self._select(fitting)), fitting.kept_bytes)
                return self._prepared(inputs, targets, fitting, division, few)
        whole = self._forward(inputs, graph=False, summed=True)
        division = self._divide(inputs, whole, limits)
        if division.reason is not None:
            self.order.warnings.append(
                f"the batch goes through the model as a whole, although its forward pass keeps "
                f"{size(whole.kept_bytes)} (a quarter of the budget is {size(self.order.budget.forward_bytes)}): "
                f"{division.reason}"
            )
            whole = self._forward(inputs)
        return self._prepared(inputs, targets, whole, division, few)

    def _few(self, inputs: Inputs, limits: Limits) -> FewSamples | None:
        """The batch's first few samples, judged already where no batch of such shapes went through the program before.

        Then their graph and gradients are gone when the whole batch's are made. They get what a chunk gets.
        """
        program = self.order.program
        judged = any(r.extension.accumulator is not None for r in self.order.requests)
        if not judged or program.keeps_training or not can_be_few(inputs):
            return None
        if limits.samples is not None and limits.samples < FEW:
            return None
        few = FewSamples(
            lambda part: self._forward(part, self.order.budget.forward_bytes, most_rounds=MOST_ROUNDS),
            self.spec.select,
            inputs,
            self.selected,
        )
        shapes = tuple((t.shape, t.dtype) for t in tensors_in(inputs))

        def meet() -> bool:
            few.ask()
            return True

        program.met.recall((shapes, tuple(self.selected)), meet)
        return few

    def _fitting(self, inputs: Inputs, few: FewSamples | None) -> Forward | None:
        """The whole batch's forward pass; None where it leaves too little of the budget for what comes after it.

        That is known as far as shapes say it: gradients at the taps, of which the probe holds two and their digits,
        the parameters' own, and a block; where a few samples are probed in place of all, theirs beside those at the
        taps once. A quarter of the budget always fits.
        """
        budget = self.order.budget
        try:
            forward = self._forward(inputs, budget.whole_bytes)
        except TooLarge:
            return None
        if forward.kept_bytes <= budget.forward_bytes:
            return forward
        outputs, left = self._select(forward), budget.total_bytes - budget.block_bytes - forward.kept_bytes
        parameters = self.selected.values()
        probing = probed_bytes(forward.tape, outputs, parameters, forward.kept_bytes)
        if probing > left and (probed := self._probed(forward, outputs, few)) is not None:
            probing = probed_bytes(forward.tape, outputs, parameters, forward.kept_bytes, probed)
            probing = max(probing, gradient_bytes(forward.tape, outputs))
        return forward if probing <= left else None

    def _probed(self, forward: Forward, outputs: Tensor, few: FewSamples | None) -> int | None:
        """How many samples of a batch need be probed if its path is new; None for all."""
        if self.order.verify or forward.routed_by_data:
            return None
        verdict = self.order.program.verdicts.get(path_of(forward, outputs, self.selected))
        if verdict is None and few is not None:
            verdict = few.verdict_for(forward, outputs)
        return None if verdict is None else verdict.probed

    @property
    def needs_backward(self) -> bool:
        """Whether anything but the outputs was asked for."""
        return any(r.extension.columns != "outputs" for r in self.order.requests)

    def part(self, inputs: Inputs, division: Division, chunk: int, expected: Tensor, few: FewSamples | None) -> Part:
        """A chunk's forward pass, which must return the rows `expected` of the whole batch."""
        forward = self._forward(division.inputs(inputs, chunk))
        outputs = self._select(forward)
        if outputs.shape != expected.shape or not same_rows(outputs.detach(), expected):
            raise EngineError(
                "verification_failed",
                "a chunk of the batch returned other outputs with a graph than without; no result is given",
                param="model",
                remedy="give a larger budget, so that the batch is not divided",
            )
        start, stop = division.bounds[chunk : chunk + 2]
        return Part(forward, outputs, start, stop, few)

    def _prepared(
        self, inputs: Inputs, targets: Tensor, forward: Forward, division: Division, few: FewSamples | None
    ) -> "Prepared":
        outputs = self._select(forward)
        _check_rows(inputs, outputs, targets)
        bound = self._bind(outputs, targets)
        probed = self.order.part is None or self._check_part(inputs, targets, forward, bound)
        work = BackwardPasses(self.order, bound, self.selected) if self.needs_backward else None
        if work is not None:
            chunks = len(division.sizes)
            part = (
                Part(forward, outputs, 0, bound.N, few)
                if chunks == 1
                else self.part(inputs, division, 0, outputs[: division.largest], few)
            )
            work.enter(part)
        planner = Planner(self.order.budget, self.order.requests, self.selected, division)
        order = self.order
        plan = planner.plan(bound, outputs, work)
        if order.is_reordered:
            plan = replace(plan, precision=order.precision, channels_last=order.channels_last)
        path = None if order.part is None else path_digest(forward.decisions, forward.readings)
        used_dropout = forward.used_dropout
        return Prepared(self, inputs, bound, outputs.detach(), used_dropout, division, work, plan, path, probed, few)

    def _check_part(self, inputs: Inputs, targets: Tensor, forward: Forward, bound: BoundLoss) -> bool:
        """Refuse a part that is not what it would be in the whole data set; whether its samples could be probed."""
        if forward.used_dropout:
            raise whole_batch_required(
                "eval", "dropout is active, and its mask is drawn for the whole batch", "leave eval=False out"
            )
        return check_part(
            lambda resized, graph: self._forward(resized, graph=graph),
            self.spec,
            inputs,
            targets,
            forward,
            bound,
            self.selected if self.needs_backward else {},
        )

    def _divide(self, inputs: Inputs, whole: Forward, limits: Limits) -> Division:
        outputs = self._select(whole)
        for request in self.order.requests:
            if request.extension.merging == "whole batch":
                reason = f"{request.label} takes all samples together"
                return Division(_one(outputs), whole.kept_bytes, reason=reason)
        N = max(1, outputs.shape[0]) if outputs.dim() else 1
        fitting = N * self.order.budget.forward_bytes // max(1, whole.kept_bytes)
        samples = max(1, fitting if limits.samples is None else min(fitting, limits.samples))
        divider = Divider(lambda part: self._forward(part, graph=False, summed=True), self.spec.select, inputs, whole)
        return divider.divide(samples, limits.least)

    def _forward(
        self,
        inputs: Inputs,
        limit_bytes: int | None = None,
        *,
        graph: bool = True,
        summed: bool = False,
        most_rounds: int | None = None,
    ) -> Forward:
        chained = graph and any(r.extension.columns == "averaged" for r in self.order.requests)
        twice = any(r.extension.residual is not None for r in self.order.requests)
        program, tape = self.order.program, Tape(Links() if chained else None, twice)
        for parameter in self.selected.values():
            tape.watch(parameter.name, parameter.tensors)
        with torch.random.fork_rng(enabled=program.keeps_training):
            if program.keeps_training:
                torch.manual_seed(self.order.seed)
            return program.run(inputs, tape, limit_bytes, graph=graph, summed=summed, most_rounds=most_rounds)

    def outputs(self, inputs: Inputs, *, graph: bool) -> Tensor:
        """What the loss is taken of, by a forward pass of its own."""
        return self._select(self._forward(inputs, graph=graph))

    def _select(self, forward: Forward) -> Tensor:
        return self.spec.select(forward.outputs)

    def _bind(self, outputs: Tensor, targets: Tensor) -> BoundLoss:
        part = self.order.part
        bound = self.spec.bind(outputs, targets, None if part is None else part.first_sample)
        second_order = [r.label for r in self.order.requests if r.extension.columns not in ("outputs", "gradient")]
        if second_order:
            bound.check_second_order(second_order)
            self.order.warnings.extend(bound.warnings)
        return bound


@dataclass(frozen=True)
class Prepared:
    """A batch before its first column.

    Attributes:
        bound: the loss on the whole batch.
        outputs: of the whole batch, without their graph.
        work: the backward passes, in the first chunk; None where only outputs are wanted.
        path: of a part of a data set, what tells the path taken through the program from others.
        probed: of a part of a data set, whether samples are shown not to be coupled.
        few: the batch's first few samples, where a verdict on them may hold for all.
    """

    preparer: Preparer
    inputs: Inputs
    bound: BoundLoss
    outputs: Tensor
    used_dropout: bool
    division: Division
    work: BackwardPasses | None
    plan: Plan
    path: str | None
    probed: bool
    few: FewSamples | None

    def parts(self) -> Iterator[BackwardPasses]:
        """The backward passes in one chunk after another."""
        assert self.work is not None
        yield self.work
        for chunk in range(1, len(self.division.sizes)):
            self.work.leave()
            start, stop = self.division.bounds[chunk : chunk + 2]
            expected = self.outputs[start:stop]
            self.work.enter(self.preparer.part(self.inputs, self.division, chunk, expected, self.few))
            yield self.work


def _one(outputs: Tensor) -> Sequence[int]:
    return (0, outputs.shape[0] if outputs.dim() else 1)


def _check_rows(inputs: Inputs, outputs: Tensor, targets: Tensor) -> None:
    """Tell a program that keeps to another batch size from targets that are too few."""
    N = targets.shape[0] if targets.dim() else 0
    rows = outputs.shape[0] if outputs.dim() else 0
    if rows != N and any(t.dim() > 0 and t.shape[0] == N for t in tensors_in(inputs)):
        raise EngineError(
            "unsupported_outputs",
            f"the model returned {rows} rows (outputs {list(outputs.shape)}) for {N} samples: it does not keep one row "
            "per sample, or the batch size that it was traced with is baked in",
            param="model",
            remedy="trace it with a batch of this size, script it, or export it with a dynamic batch axis",
        )
