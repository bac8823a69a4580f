"""Every extension on the device in float32, beside the CPU in float64: the others' results do not hang on one's."""

from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.nets import NETS
from benchmarks.gpu_checks.attempts import attempt, failed
from torch import Tensor

import curvature_engine as engine

MOST = 1e-3
"""Of the relative error in Euclidean norm: far above rounding, far below any mistake."""
LEFT_OUT = ("kfra", "diag_hessian", "batch_diag_hessian")
"""Not for these nets: one takes chains of a few hundred elements; the others take a backward pass per component."""


def correctness(place: Place, quick: bool) -> dict[str, Any]:
    names = [e["name"] for e in engine.catalogue()["extensions"] if e["name"] not in LEFT_OUT]
    tables = {net: attempt(lambda net=net: _of(net, names, place)) for net in (["3c3d"] if quick else NETS)}
    wrong = [net for net, table in tables.items() if failed(table)]
    errors = {f"{net} {name}": error for net in tables if net not in wrong for name, error in tables[net].items()}
    wrong += [which for which, error in errors.items() if failed(error)]
    wrong += [which for which, error in errors.items() if not isinstance(error, str) and not error <= MOST]
    return {"relative errors": tables, "wrong": wrong}


def _of(net: str, names: list[str], place: Place) -> dict[str, Any]:
    here, there = (Case(net, 2, NETS[net].classes, p) for p in (Place(torch.device("cpu"), torch.float64), place))
    there.module.load_state_dict(here.module.state_dict())
    sides = [(case, engine.load(case.module, device=case.place.device)) for case in (here, there)]
    # Of the language model, exact quantities take a column per class and position.
    of_net = [n for n in names if here.positions == 1 or not (n.endswith("_exact") or n == "kflr")]
    return {name: attempt(lambda name=name: _worst(*sides, name)) for name in of_net}


Side = tuple[Case, engine.Program]


def _worst(here: Side, there: Side, name: str) -> float | str:
    """The largest relative error of a tensor; of what is refused on the CPU, the refusal."""
    results = []
    for case, program in (here, there):
        try:
            results.append(engine.analyze(program, case.inputs, case.targets, [name], loss=case.loss))
        except engine.EngineError as error:
            if case is here[0]:
                return f"refused: {error.message}"
            raise
    expected, found = (result.groups[name].tensors for result in results)
    return max(relative(found[key], value) for key, value in expected.items())


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference beside that of what is expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
