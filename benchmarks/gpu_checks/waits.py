"""How often a warm analysis in the ordinary way makes the host wait for the device, as torch sees it."""

import os
import warnings
from collections import Counter
from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.nets import NETS

import curvature_engine as engine

LEFT_OUT = ("kfra",)
MOST = {"diag_hessian": 4, "batch_diag_hessian": 4}
MOST_OTHERS = 3
"""The targets' range; whether the loss and the outputs are finite."""


def waits(place: Place, quick: bool) -> dict[str, Any]:
    case = Case("3c3d", 2 if quick else 32, NETS["3c3d"].classes, place)
    program = engine.load(case.module, device=place.device)
    found = {
        entry["name"]: _of(program, case, entry["name"])
        for entry in engine.catalogue()["extensions"]
        if entry["name"] not in LEFT_OUT
    }
    wrong = [name for name, places in found.items() if sum(places.values()) > MOST.get(name, MOST_OTHERS)]
    return {"waits": found, "wrong": wrong}


def _of(program: engine.Program, case: Case, name: str) -> dict[str, int]:
    batch = case.inputs, case.targets
    engine.analyze(program, *batch, [name])
    if case.place.device.type != "cuda":
        return {}
    os.environ["CURVATURE_GRAPHS"] = "off"
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.analyze(program, *batch, [name])
        finally:
            torch.cuda.set_sync_debug_mode(before)
            del os.environ["CURVATURE_GRAPHS"]
    # Not torch's notice that it does not see all of them.
    found = [w for w in seen if "called a synchronizing CUDA operation" in str(w.message)]
    return dict(Counter(f"{w.filename}:{w.lineno}" for w in found))
