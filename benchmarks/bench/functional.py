"""`torch.func`: individual gradients by `vmap` of `grad`; GGN diagonals by `vmap` over samples and columns."""

from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.reductions import REDUCTIONS
from benchmarks.bench.works import Work
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap

DIAGONALS = {"diag_ggn_exact", "diag_ggn_mc", "batch_diag_ggn_exact", "batch_diag_ggn_mc"}
MOST_BYTES = 10**9
"""Of Jacobians at a time."""
MOST_GRADIENT_BYTES = 3 * 10**9
"""vmap makes them all at once, and some of their squares."""


def functional(case: Case, work: Work) -> Job:
    if work.names != ("grad",) and set(work.names) <= REDUCTIONS.keys():
        return _first_order(case, work)
    if len(work.names) == 1 and work.names[0] in DIAGONALS:
        if case.positions > 1 and not work.sampled:
            raise Unable("exact GGN diagonals with positions are not feasible with torch.func")
        return _diagonal(case, work.names[0])
    raise Unable("not written for torch.func")


def _first_order(case: Case, work: Work) -> Job:
    parameters = {name: p.detach() for name, p in case.module.named_parameters()}
    gradient_bytes = 4 * case.N * sum(p.numel() for p in parameters.values())
    if gradient_bytes > MOST_GRADIENT_BYTES:
        raise Unable(f"its individual gradients take {gradient_bytes / 1e9:.1f} GB")

    def contribution(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(case.module, parameters, (x.unsqueeze(0),))
        return case.contribution(outputs, y.unsqueeze(0))

    gradients = vmap(grad(contribution), in_dims=(None, 0, 0))

    def run(labels: Tensor | None = None) -> Any:
        found = gradients(parameters, case.inputs, case.targets)
        return {name: {k: REDUCTIONS[name].batched(g) for k, g in found.items()} for name in work.names}

    return Job(run, lambda found: found)


def _exact_columns(outputs: Tensor) -> Tensor:
    """[C] → [C columns, C]."""
    root = outputs.softmax(0).sqrt()
    return torch.diag(root) - torch.outer(root, root.square())


def _diagonal(case: Case, name: str) -> Job:
    parameters = {k: p.detach() for k, p in case.module.named_parameters()}
    sampled = name.endswith("_mc")
    V = 1 if sampled else case.columns
    bytes_each = 4 * V * sum(p.numel() for p in parameters.values())
    chunk = max(1, min(case.N, MOST_BYTES // bytes_each))

    def squares(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        def outputs_of(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(case.module, parameters, (x.unsqueeze(0),)).squeeze(0)

        outputs, pull = vjp(outputs_of, parameters)
        one_hot = torch.arange(case.classes, device=outputs.device) == label.unsqueeze(-1)
        columns = (outputs.softmax(-1) - one_hot.to(outputs)).unsqueeze(0) if sampled else _exact_columns(outputs)
        pulled = vmap(pull)(columns / (case.N * case.positions) ** 0.5)[0]
        return {k: g.square().sum(0) for k, g in pulled.items()}

    def run(labels: Tensor | None = None) -> Any:
        labels = _labels(case, labels) if sampled else case.targets
        parts = []
        for first in range(0, case.N, chunk):
            rows = slice(first, first + chunk)
            found = vmap(squares)(case.inputs[rows], labels[rows])
            parts.append(found if name.startswith("batch") else {k: d.sum(0, keepdim=True) for k, d in found.items()})
        joined = {k: torch.cat([part[k] for part in parts]) for k in parameters}
        return joined if name.startswith("batch") else {k: d.sum(0) for k, d in joined.items()}

    def read(found: Any) -> Results:
        return {name: found}

    return Job(run, read)


def _labels(case: Case, labels: Tensor | None) -> Tensor:
    """Those given, or drawn, which takes a forward pass."""
    if labels is not None:
        return labels
    with torch.no_grad():
        return torch.distributions.Categorical(logits=case.module(case.inputs)).sample()
