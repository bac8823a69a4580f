"""What another precision of products, or channels last, changes and saves."""

from typing import Any

from benchmarks.bench.cases import Case, Place
from benchmarks.bench.nets import NETS
from benchmarks.gpu_checks.clock import seconds
from benchmarks.gpu_checks.correctness import relative

import curvature_engine as engine

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "channels last": {"channels_last": True},
    "tf32": {"precision": "tf32"},
    "tf32, channels last": {"precision": "tf32", "channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
}
WORKS = ("grad", "variance", "sum_grad_squared", "diag_ggn_mc", "kfac")


def precision(place: Place, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for net in ["3c3d"] if quick else ["3c3d", "allcnnc", "resnet18", "gpt"]:
        case = Case(net, 2 if quick else 128 if net != "gpt" else 8, NETS[net].classes, place)
        program = engine.load(case.module, device=place.device)
        found[net] = {name: _measure(program, case, options, quick) for name, options in OPTIONS.items()}
    return found


def _measure(program: engine.Program, case: Case, options: dict[str, Any], quick: bool) -> Any:
    batch = case.inputs, case.targets

    def run(work: str, **given: Any) -> engine.Analysis:
        return engine.analyze(program, *batch, [work], loss=case.loss, **given)

    try:
        told = run("grad", **options).precision_error
        table = {}
        for work in WORKS:
            exact, changed = run(work), run(work, **options)
            tensors = exact.groups[work].tensors
            table[work] = {
                "error": max(relative(changed.groups[work].tensors[key], value) for key, value in tensors.items()),
                "seconds": seconds(lambda work=work: run(work, **options), case.place, 1 if quick else 5),
            }
    except engine.EngineError as error:
        return str(error)
    return {"told": None if told is None else told.to_dict(), "works": table}
