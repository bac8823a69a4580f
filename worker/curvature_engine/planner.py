"""Makes the plan of an analysis from its program, shapes and budget, once the forward pass has been probed.

Costs count multiplications and additions with parameters: of reductions, and of backward passes through the operators
that consume parameters (twice what writing their gradients out costs). What happens between them is not counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from curvature_engine.budget import Budget
from curvature_engine.contributions import Contribution
from curvature_engine.division import Division
from curvature_engine.extensions import Accumulator, Extension, Sketch
from curvature_engine.losses import BoundLoss
from curvature_engine.passes import BackwardPasses
from curvature_engine.plans import ParameterPlan, Plan, RequestPlan
from curvature_engine.precision import accumulation_dtype, dtype_name
from curvature_engine.probe import Code
from curvature_engine.program import Parameter
from curvature_engine.requests import Request
from curvature_engine.stores import ResultStore
from curvature_engine.tape import Tape
from curvature_engine.version import __version__

LEAST_FILE_BYTES = 2**20
"""Smaller results are not worth a file."""


class Planner:
    """Plans one analysis; the largest chunk's part must have been entered (its first one is)."""

    def __init__(
        self, budget: Budget, requests: Sequence[Request], selected: Mapping[str, Parameter], division: Division
    ) -> None:
        self._budget, self._requests, self._selected, self._division = budget, requests, selected, division

    def plan(self, bound: BoundLoss, outputs: Tensor, work: BackwardPasses | None) -> Plan:
        """The plan; without `work`, of outputs alone. Batches of a kind share it."""
        if work is None or any(r.options.get("against") is not None for r in self._requests):
            return self._made(bound, outputs, work)
        division = tuple(self._division.bounds), self._division.forward_bytes, self._division.reason
        key = "plan", work.kind, self._budget, division, bound.N, tuple(outputs.shape), outputs.dtype
        found: Plan = work.recall(key, lambda: self._made(bound, outputs, work))
        return replace(found, columns=dict(found.columns))

    def _made(self, bound: BoundLoss, outputs: Tensor, work: BackwardPasses | None) -> Plan:
        patterns = {} if work is None or not work.methods else {n: work.contribution(n) for n in self._selected}
        accumulators = {} if work is None else {t.request.label: t for t in work.tasks(ResultStore())}
        parts = []
        for request in self._requests:
            task = accumulators.get(request.label)
            parts.append(
                self._of_outputs(request, bound)
                if task is None
                else self._of_columns(request, task.accumulator, patterns)
            )
        columns = {"gradient": 0, "exact": 0, "sampled": 0} if work is None else work.columns
        one_gradient = 2 * sum(p.multiply_adds() for p in patterns.values()) * len(self._division.sizes)
        passes = self._backward_passes(columns, patterns, bound.N)
        cost = passes * one_gradient + sum(p.multiply_adds for p in parts)
        others = {id(t.accumulator.setting.against): t.accumulator.setting.against for t in accumulators.values()}
        held = self._held_bytes(work, outputs, parts) + sum(a.held_bytes for a in others.values() if a is not None)
        parts, resident = self._stream(parts, held)
        return Plan(
            N=bound.N,
            dtype=dtype_name(outputs.dtype),
            device=str(outputs.device),
            engine_version=__version__,
            budget_bytes=self._budget.total_bytes,
            block_bytes=self._budget.block_bytes,
            samples_per_chunk=self._division.largest,
            chunks=len(self._division.sizes),
            columns=dict(columns),
            forward_bytes=self._division.forward_bytes,
            peak_bytes=held + resident,
            result_bytes=sum(p.result_bytes for p in parts),
            backward_passes=passes,
            multiply_adds=cost,
            gradients=cost / one_gradient if one_gradient else float(passes),
            requests=tuple(parts),
            whole_reason=self._division.reason,
        )

    # Requests

    def _of_outputs(self, request: Request, bound: BoundLoss) -> RequestPlan:
        """A request without an accumulator: quantities of the outputs, and the gradient itself."""
        name = request.extension.name
        if name != "grad":
            nbytes = bound.outputs.nbytes if name == "outputs" else bound.N * bound.outputs.dtype.itemsize
            return self._request(request, nbytes, ())
        parameters = [
            ParameterPlan(n, tuple(p.tensor.shape), "closed form", "autograd", 0, 0, 0, _bytes(p, [p.tensor.shape]))
            for n, p in self._selected.items()
        ]
        return self._request(request, 0, parameters)

    def _of_columns(
        self, request: Request, accumulator: Accumulator, patterns: Mapping[str, Contribution]
    ) -> RequestPlan:
        whole = request.extension.kind == "tensor"
        parameters, largest = [], 0
        for name, contribution in patterns.items():
            parameter = self._selected[name]
            sketch = accumulator.sketch(name, contribution)
            result_bytes = _bytes(parameter, sketch.shapes)
            largest = max(largest, result_bytes)
            method = "none" if sketch.missing is not None else contribution.method
            by_blocks = sketch.form == "materialised" and method != "none"
            parameters.append(
                ParameterPlan(
                    name,
                    tuple(parameter.tensor.shape),
                    method,
                    None if method in ("none", "absent") else sketch.form,
                    accumulator.setting.columns * sketch.multiply_adds * len(self._division.sizes),
                    0 if method == "none" else _intermediate_bytes(sketch, contribution, result_bytes),
                    contribution.samples_per_block if by_blocks else 0,
                    0 if whole else result_bytes,
                    sketch.missing,
                )
            )
        return self._request(request, largest if whole else 0, parameters, accumulator.setting.columns)

    def _request(
        self, request: Request, own_bytes: int, parameters: Sequence[ParameterPlan], columns: int = 0
    ) -> RequestPlan:
        extension: Extension = request.extension
        return RequestPlan(
            request.label,
            extension.name,
            extension.columns,
            columns or int(extension.columns == "gradient"),
            extension.merging,
            streamed=False,
            multiply_adds=sum(p.multiply_adds for p in parameters),
            result_bytes=own_bytes + sum(p.result_bytes for p in parameters),
            parameters=tuple(parameters),
        )

    # Cost and memory

    def _backward_passes(self, columns: Mapping[str, int], patterns: Mapping[str, Contribution], N: int) -> int:
        fallbacks = sum(c.method == "fallback" for c in patterns.values())
        per_column = 1 + (self._division.largest if fallbacks else 0)
        residual = any(r.extension.residual is not None for r in self._requests)
        elements = sum(p.tensor.numel() for p in self._selected.values()) if residual else 0
        return sum(columns.values()) * per_column + elements

    def _held_bytes(self, work: BackwardPasses | None, outputs: Tensor, parts: Sequence[RequestPlan]) -> int:
        """The most that is held at a time beside results: graph, gradients at the taps, one parameter's intermediates.

        Where gradients are reduced as they arrive, those count that wait for others.
        """
        if work is None:
            return self._division.forward_bytes
        intermediates = max((p.peak_bytes for r in parts for p in r.parameters), default=0)
        columns = 3 * outputs.nbytes
        probing = 0
        if work.methods:
            forward_bytes = self._division.forward_bytes
            probing = probed_bytes(work.tape, work.outputs, self._selected.values(), forward_bytes, work.probed)
        computing = work.waiting_bytes() + work.arranged_bytes() + work.kept_bytes + intermediates + columns
        return self._division.forward_bytes + max(probing, computing)

    def _stream(self, parts: Sequence[RequestPlan], held: int) -> tuple[list[RequestPlan], int]:
        """(requests, bytes of results that stay in memory): the largest go to files until the rest fits."""
        resident = sum(p.result_bytes for p in parts)
        streamed: set[str] = set()
        streams = {r.label for r in self._requests if r.extension.streams}
        for part in sorted(parts, key=lambda p: (-p.result_bytes, p.label)):
            fits = held + resident <= self._budget.total_bytes
            if part.label in streams and not fits and part.result_bytes >= LEAST_FILE_BYTES:
                streamed.add(part.label)
                resident -= part.result_bytes
        return [replace(p, streamed=p.label in streamed) for p in parts], resident


def gradient_bytes(tape: Tape, outputs: Tensor) -> int:
    """What the gradients at all taps take, for one cotangent."""
    itemsize = accumulation_dtype(outputs.dtype).itemsize
    return sum(prod(shape) for tap in tape.taps for shape in tap.shapes) * itemsize


def probed_bytes(
    tape: Tape, outputs: Tensor, parameters: Iterable[Parameter], forward_bytes: int, few: int | None = None
) -> int:
    """What probing a part, whose forward pass keeps `forward_bytes`, holds beside that.

    The gradients at its taps under the plain cotangent and under one that is scaled by a digit of the samples' numbers,
    the digits, a byte each; and the parameters' gradients, with which summed contributions are compared. Of a `few`
    samples in place of all, these have a forward pass of their own.
    """
    N = max(1, outputs.shape[0] if outputs.dim() else 1)
    elements = sum(prod(shape) for tap in tape.taps for shape in tap.shapes)
    compared = 3 * sum(_bytes(p, [p.tensor.shape]) for p in parameters)
    if few is not None:
        elements, forward_bytes, N = -(-elements * few // N), -(-forward_bytes * few // N), few
    digits = len(Code(N, 64).factors(torch.device("cpu")))
    gradients = elements * accumulation_dtype(outputs.dtype).itemsize
    return 2 * gradients + digits * elements + compared + (0 if few is None else forward_bytes)


def _intermediate_bytes(sketch: Sketch, contribution: Contribution, result_bytes: int) -> int:
    if sketch.intermediate_bytes is not None:
        return sketch.intermediate_bytes
    return contribution.working_bytes() if sketch.form == "materialised" else 2 * result_bytes


def _bytes(parameter: Parameter, shapes: Sequence[Sequence[int]]) -> int:
    itemsize = accumulation_dtype(parameter.tensor.dtype).itemsize
    return sum(prod(shape) for shape in shapes) * itemsize
