"""BackPACK 1.7.1. Its backward pass makes the gradient as well, whether one wants it or not."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.bench.cases import Case, ClassesSecond
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.works import KRONECKER, Request, Work
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from backpack import backpack as active
    from backpack import extend
    from backpack import extensions as peer
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives

EXTENSIONS: dict[str, Callable[[], Any]] = {
    "batch_grad": peer.BatchGrad,
    "batch_l2": peer.BatchL2Grad,
    "sum_grad_squared": peer.SumGradSquared,
    "variance": peer.Variance,
    "diag_ggn_exact": peer.DiagGGNExact,
    "diag_ggn_mc": peer.DiagGGNMC,
    "batch_diag_ggn_exact": peer.BatchDiagGGNExact,
    "batch_diag_ggn_mc": peer.BatchDiagGGNMC,
    "sqrt_ggn_exact": peer.SqrtGGNExact,
    "sqrt_ggn_mc": peer.SqrtGGNMC,
    "diag_hessian": peer.DiagHessian,
    "batch_diag_hessian": peer.BatchDiagHessian,
    "kfac": peer.KFAC,
    "kflr": peer.KFLR,
    "kfra": peer.KFRA,
}
SAVED_AS = {
    "batch_grad": "grad_batch",
    "batch_diag_ggn_exact": "diag_ggn_exact_batch",
    "batch_diag_ggn_mc": "diag_ggn_mc_batch",
    "diag_hessian": "diag_h",
    "batch_diag_hessian": "diag_h_batch",
}


def backpack(case: Case, work: Work) -> Job:
    asked = [_asked(request) for request in work.requests if request.name != "grad"]
    if not asked:
        raise Unable("the gradient alone is PyTorch's")
    module = _extended(case)
    criterion = extend(nn.CrossEntropyLoss())
    parameters = _named(case, module)

    def run(labels: Tensor | None = None) -> None:
        for p in parameters.values():
            p.grad = None
        with _drawn(labels), active(*(make() for make in asked)):
            criterion(module(case.inputs), case.targets).backward()

    def read(_: None) -> Results:
        return {name: {k: _value(name, p) for k, p in parameters.items()} for name in work.names}

    def release() -> None:
        for p in parameters.values():
            p.grad = None
            for name in work.names:
                vars(p).pop(SAVED_AS.get(name, name), None)

    return Job(run, read, release)


def _asked(request: Request) -> Callable[[], Any]:
    if request.name not in EXTENSIONS:
        raise Unable("BackPACK has no such extension")
    if request.name in KRONECKER and request.options["approximation"] != "backpack":
        raise Unable("BackPACK has factors of its own form only")
    return EXTENSIONS[request.name]


def _extended(case: Case) -> nn.Module:
    """Its own copy, converted where it is not a sequence of modules that BackPACK knows."""
    plain = isinstance(case.module, nn.Sequential) and not any(len(list(m.children())) for m in case.module)
    if plain:
        return extend(case.copy())
    module = ClassesSecond(case.copy()) if case.positions > 1 else case.copy()
    return extend(module.eval(), use_converter=True).eval()


def _named(case: Case, module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under our names; the converter renames, keeping values."""
    found = dict(module.named_parameters())
    names = dict(case.module.named_parameters())
    if found.keys() == names.keys():
        return found
    matched = {}
    for name, tensor in names.items():
        equal = [p for p in found.values() if p.shape == tensor.shape and torch.equal(p, tensor)]
        if len(equal) != 1:
            raise Unable("its converter renames parameters beyond recognition")
        matched[name] = equal[0]
    return matched


def _value(name: str, parameter: nn.Parameter) -> Any:
    value = getattr(parameter, SAVED_AS.get(name, name))
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def _drawn(labels: Tensor | None) -> Iterator[None]:
    """Have BackPACK draw these labels."""
    if labels is None:
        yield
        return
    before = CrossEntropyLossDerivatives._make_distribution
    likelihood = SimpleNamespace(sample=lambda shape: labels.unsqueeze(0))
    CrossEntropyLossDerivatives._make_distribution = lambda self, outputs: likelihood
    try:
        yield
    finally:
        CrossEntropyLossDerivatives._make_distribution = before
