"""Opacus 1.6: individual gradients, and their norms without making them ("ghost norms")."""

import warnings
from importlib.util import find_spec
from typing import Any

from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.works import Work
from torch import Tensor

HAS = {"batch_grad", "batch_l2"}


def opacus(case: Case, work: Work) -> Job:
    if len(work.names) != 1 or work.names[0] not in HAS:
        raise Unable("Opacus has individual gradients and their norms")
    if find_spec("opacus") is None:
        raise Unable("not installed: `make bench` brings it")
    name = work.names[0]
    module = _wrapped(case, name)
    parameters = dict(module._module.named_parameters())

    def run(labels: Tensor | None = None) -> None:
        module.zero_grad(set_to_none=True)
        case.contribution(module(case.inputs), case.targets).backward()

    def read(_: None) -> Results:
        if name == "batch_l2":
            return {name: {k: p._norm_sample.square() for k, p in parameters.items()}}
        return {name: {k: p.grad_sample for k, p in parameters.items()}}

    def release() -> None:
        module.zero_grad(set_to_none=True)
        for p in parameters.values():
            p._norm_sample = None

    return Job(run, read, release)


def _wrapped(case: Case, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    # It captures only in train mode; of these nets only BatchNorm would differ, and that it refuses. "sum" leaves
    # gradients as the loss has scaled them.
    wrapper = GradSampleModule if name == "batch_grad" else GradSampleModuleFastGradientClipping
    return wrapper(case.copy().train(), loss_reduction="sum", strict=True)
