"""Every extension on the device in float32, beside the CPU in float64."""

from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.nets import NETS
from torch import Tensor

import curvature_engine as engine

MOST = 1e-3
"""Of the relative error in Euclidean norm: far above rounding, far below any mistake."""
LEFT_OUT = ("kfra", "diag_hessian", "batch_diag_hessian")
"""Not for these nets: one takes chains of a few hundred elements; the others take a backward pass per component."""


def correctness(place: Place, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = [e["name"] for e in engine.catalogue()["extensions"] if e["name"] not in LEFT_OUT]
    for net in ["3c3d"] if quick else NETS:
        here, there = (Case(net, 2, NETS[net].classes, p) for p in (Place(torch.device("cpu"), torch.float64), place))
        there.module.load_state_dict(here.module.state_dict())
        # Of the language model, exact quantities take a column per class and position.
        of_net = [n for n in names if here.positions == 1 or not (n.endswith("_exact") or n == "kflr")]
        found[net] = {name: _worst(here, there, name) for name in of_net}
    errors = {f"{net} {name}": error for net, table in found.items() for name, error in table.items()}
    wrong = [which for which, error in errors.items() if not isinstance(error, str) and not error <= MOST]
    return {"relative errors": found, "wrong": wrong}


def _worst(here: Case, there: Case, name: str) -> float | str:
    """The largest relative error of a tensor; of what is refused on the CPU, the refusal."""
    results = []
    for case in (here, there):
        try:
            device = case.place.device
            results.append(
                engine.analyze(case.module, case.inputs, case.targets, [name], loss=case.loss, device=device)
            )
        except engine.EngineError as error:
            if case is here:
                return f"refused: {error.message}"
            raise
    expected, found = (result.groups[name].tensors for result in results)
    return max(relative(found[key], value) for key, value in expected.items())


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference beside that of what is expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
