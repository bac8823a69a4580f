"""The engine: `analyze` on a program that was loaded once, from a scripted module."""

from functools import lru_cache
from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.works import Work
from torch import Tensor

import curvature_engine as engine


@lru_cache(maxsize=1)
def _program(case: Case) -> engine.Program:
    return engine.load(torch.jit.script(case.module), device=case.place.device)


def ours(case: Case, work: Work, *, channels_last: bool = False) -> Job:
    program = _program(case)
    requests = [{"name": request.name, "options": request.options} for request in work.requests]

    def run(labels: Tensor | None = None) -> engine.Analysis:
        return engine.analyze(program, case.inputs, case.targets, requests, loss=case.loss, channels_last=channels_last)

    def read(analysis: engine.Analysis) -> Results:
        if analysis.plan.streamed:
            raise Unable(f"results exceed the budget: {', '.join(analysis.plan.streamed)}")
        return {name: _values(analysis[name]) for name in work.names}

    return Job(run, read)


def _values(found: Any) -> dict[str, Any]:
    if isinstance(found, Tensor):
        return {"": found}
    return {
        name: tuple(m for m in (value.B, value.A) if m is not None)
        if isinstance(value, engine.KroneckerFactors)
        else value
        for name, value in found.items()
    }


def drawn_labels(case: Case) -> Tensor:
    """What the engine draws with seed 0 [N, …positions], read off its column: softmax minus the label drawn."""
    from curvature_engine.losses import LossSpec

    with torch.no_grad():
        outputs = case.module(case.inputs)
    bound = LossSpec.parse(case.loss, None).bind(outputs, case.targets)
    return bound.sampled_column(0, 0).argmin(-1 if case.positions > 1 else 1)
