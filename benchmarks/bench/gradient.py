"""The unit: one forward pass, the loss, one backward pass to every parameter."""

from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.works import Work
from torch import Tensor


def gradient(case: Case, work: Work) -> Job:
    if work.names != ("grad",):
        raise Unable("only the gradient")
    return unit(case)


def unit(case: Case) -> Job:
    module = case.module
    parameters = dict(module.named_parameters())

    def run(labels: Tensor | None = None) -> Any:
        return torch.autograd.grad(case.contribution(module(case.inputs), case.targets), [*parameters.values()])

    def read(found: Any) -> Results:
        return {"grad": dict(zip(parameters, found, strict=True))}

    return Job(run, read)
