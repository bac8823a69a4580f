"""The naive loop: a forward and a backward pass per sample."""

from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.reductions import REDUCTIONS
from benchmarks.bench.works import Work
from torch import Tensor

MOST_SAMPLES = 32
"""A loop's time is proportional to them, and the default run's is not unlimited."""


def naive(case: Case, work: Work) -> Job:
    if work.names == ("grad",) or not set(work.names) <= REDUCTIONS.keys():
        raise Unable("the loop is for quantities of individual gradients")
    if case.N > MOST_SAMPLES:
        raise Unable(f"timed up to N = {MOST_SAMPLES}; its time is proportional to N")
    module = case.module
    parameters = dict(module.named_parameters())

    def gradient_of(n: int) -> tuple[Tensor, ...]:
        outputs = module(case.inputs[n : n + 1])
        return torch.autograd.grad(case.contribution(outputs, case.targets[n : n + 1]), [*parameters.values()])

    def run(labels: Tensor | None = None) -> Any:
        looped = {name: REDUCTIONS[name].loop() for name in work.names}
        for n in range(case.N):
            gradients = gradient_of(n)
            for reduction in looped.values():
                reduction.add(gradients)
        return {name: reduction.finish(case.N) for name, reduction in looped.items()}

    def read(found: Any) -> Results:
        return {name: dict(zip(parameters, tensors, strict=True)) for name, tensors in found.items()}

    return Job(run, read)
