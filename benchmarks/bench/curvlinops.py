"""curvlinops 3: Kronecker factors of linear layers and convolutions, expand and reduce, without inverting them.

It has no exact diagonal of the GGN, only Hutchinson's estimate of one.
"""

import warnings
from typing import Any

from benchmarks.bench.cases import Case, ClassesSecond
from benchmarks.bench.jobs import Job, Results, Unable
from benchmarks.bench.works import Work
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import KFACLinearOperator

FISHERS = {"kfac": "mc", "kflr": "type-2"}


class _Drawing(KFACLinearOperator):
    """Takes labels for those drawn from the model."""

    labels: Tensor | None = None

    def draw_label(self, output: Tensor) -> Tensor:
        return super().draw_label(output) if self.labels is None else self.labels.flatten()


def curvlinops(case: Case, work: Work) -> Job:
    request = work.requests[0]
    approximation = request.options.get("approximation")
    if len(work.requests) > 1 or request.name not in FISHERS:
        raise Unable("curvlinops has no such quantity (of diagonals, only Hutchinson's estimate)")
    if approximation not in ("expand", "reduce"):
        raise Unable("curvlinops has factors of the forms expand and reduce")
    net = case.copy()
    module = ClassesSecond(net) if case.positions > 1 else net
    layers = _layers(net)
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    names = {("net." if module is not net else "") + name: name for name in layers}

    def run(labels: Tensor | None = None) -> KFACLinearOperator:
        operator = _Drawing(
            *(module, nn.CrossEntropyLoss(), parameters, [(case.inputs, case.targets)]),
            check_deterministic=False,
            fisher_type=FISHERS[request.name],
            kfac_approx=approximation,
        )
        operator.labels = labels
        operator.compute_kronecker_factors()
        return operator

    def read(operator: KFACLinearOperator) -> Results:
        found: dict[str, Any] = {}
        for layer, B in operator._gradient_covariances.items():
            name = names[layer]
            found[f"{name}.weight"] = (B, operator._input_covariances[layer])
            if layers[name].bias is not None:
                found[f"{name}.bias"] = (B,)
        return {request.name: found}

    return Job(run, read)


def _layers(net: nn.Module) -> dict[str, Any]:
    """Layers with factors; not one whose weight is another's too, which the engine lists as without."""
    others = {id(p) for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    kinds = (nn.Linear, nn.Conv2d)
    return {name: m for name, m in net.named_modules() if isinstance(m, kinds) and id(m.weight) not in others}
