"""How exact the engine is: every extension on every kind of model, against brute force and against BackPACK.

    python benchmarks/exactness.py [--output FILE]

Prints Markdown. A cell of the first table is the largest error relative to the tensor's largest entry, over
{cross-entropy, squared error} × {mean, sum} × {scripted, traced}, in float64, against the plain-autograd reference of
the tests. Monte-Carlo rows are no errors but the worst number of standard errors. Exits with 1 if a deterministic
cell exceeds 1e-10, or an interpreted forward differs from TorchScript's.
"""

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.engine.models import CASES, Case, build, targets_for, torchscript
from tests.engine.reference import Reference

import curvature_engine as engine

TOLERANCE = 1e-10
COLUMNS = {
    "MLP": "mlp",
    "CNN": "cnn",
    "residual CNN, BatchNorm": "residual_batchnorm",
    "grouped, dilated, transposed convolutions": "convolutions",
    "LayerNorm + GELU block": "layernorm_gelu",
    "embedding": "embedding",
    "shared weight": "shared_weight",
    "data-dependent If and Loop": "if_and_loop",
    "two inputs": "two_inputs",
}
PER_PARAMETER = ["grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact"]
APPROXIMATIONS = ["expand", "reduce", "backpack"]
DRAWS_PER_SEED, SEEDS = 50, 40
MONTE_CARLO = {name: f"`{name}`: worst number of standard errors from exact" for name in ("diag_ggn_mc", "kfac")}
PEERED = {"MLP": "mlp", "CNN": "cnn", "1-D convolutions": "convolutions_1d", "3-D convolutions": "convolutions_3d"}

Cells = dict[tuple[str, str], float]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry; infinite where the shapes differ or a value is NaN."""
    expected = expected.detach()
    if actual.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    error = float((actual - expected).abs().max() / scale)
    return error if error == error else float("inf")


def settings(name: str) -> Iterator[tuple[str, str, str]]:
    """Every (loss, reduction, way of making TorchScript) that applies to a model."""
    case = BY_NAME[name]
    for loss in case.losses:
        for reduction in ("mean", "sum"):
            for way in case.ways:
                yield loss, reduction, way


def deterministic_errors(name: str) -> tuple[dict[str, float], bool]:
    """(row → largest error over all settings, whether every forward equals TorchScript's bit for bit)."""
    requests: list[Any] = ["batch_loss", "outputs", *PER_PARAMETER]
    requests += [{"name": "kflr", "label": a, "options": {"approximation": a}} for a in APPROXIMATIONS]
    worst: dict[str, float] = {}
    bit_equal = True
    for loss, reduction, way in settings(name):
        module, inputs = build(BY_NAME[name])
        targets = targets_for(module(*inputs), loss)
        reference = Reference(module, inputs, targets, loss, reduction)
        script = torchscript(module, inputs, way)
        result = engine.analyze(script, inputs, targets, requests, loss=loss, reduction=reduction)
        with torch.jit.optimized_execution(False):
            bit_equal = bit_equal and torch.equal(result["outputs"], script(*inputs))
        for row, actual, expected in compared(result, reference):
            worst[row] = max(worst.get(row, 0.0), relative_error(actual, expected))
    return worst, bit_equal


def compared(result: engine.Analysis, reference: Reference) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(row, the engine's tensor, the reference's)."""
    yield "`loss`", result.loss, reference.loss_value()
    yield "`batch_loss`", result["batch_loss"], reference.contributions()
    yield "`outputs`", result["outputs"], reference.outputs
    for extension in PER_PARAMETER:
        for parameter, expected in reference.expected(extension).items():
            yield f"`{extension}`", result[extension][parameter], expected
    for approximation in APPROXIMATIONS:
        for parameter, pair in reference.kflr(approximation).items():
            ours = result[approximation][parameter]
            for actual, expected in zip(ours, pair, strict=True):
                if expected is not None:
                    yield f"`kflr` {approximation}", actual, expected


def standard_errors(name: str) -> dict[str, float]:
    """Row → worst |mean − exact| in standard errors, both losses; the spread between seeds gives the error."""
    worst = dict.fromkeys(MONTE_CARLO, 0.0)
    for loss in BY_NAME[name].losses:
        module, inputs = build(BY_NAME[name])
        targets = targets_for(module(*inputs), loss)
        program = engine.load(torchscript(module, inputs, BY_NAME[name].ways[-1]))
        exact = engine.analyze(program, inputs, targets, ["diag_ggn_exact", "kflr"], loss=loss)
        requests = [{"name": n, "options": {"mc_samples": DRAWS_PER_SEED}} for n in MONTE_CARLO]
        runs = [engine.analyze(program, inputs, targets, requests, loss=loss, seed=seed) for seed in range(SEEDS)]
        for parameter, expected in exact["diag_ggn_exact"].items():
            means = torch.stack([r["diag_ggn_mc"][parameter] for r in runs])
            worst["diag_ggn_mc"] = max(worst["diag_ggn_mc"], deviation(means, expected))
        for parameter, pair in exact["kflr"].items():
            means = torch.stack([r["kfac"][parameter].B for r in runs])
            worst["kfac"] = max(worst["kfac"], deviation(means, pair.B))
    return worst


def deviation(means: Tensor, expected: Tensor) -> float:
    """Worst |z| of the grand mean; entries that are exactly zero have no spread and are left out."""
    error = means.std(0) / SEEDS**0.5
    z = (means.mean(0) - expected).abs() / error.clamp(min=1e-14)
    z = z[expected.abs() > 1e-12]
    return float(z.max()) if z.numel() else 0.0


def backpack_errors(name: str) -> dict[str, float]:
    """Row → largest error against BackPACK over both losses and reductions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from backpack import backpack, extend
        from backpack import extensions as peer

        peers: dict[str, tuple[Callable[[], Any], str]] = {
            "batch_grad": (peer.BatchGrad, "grad_batch"),
            "batch_l2": (peer.BatchL2Grad, "batch_l2"),
            "sum_grad_squared": (peer.SumGradSquared, "sum_grad_squared"),
            "variance": (peer.Variance, "variance"),
            "diag_ggn_exact": (peer.DiagGGNExact, "diag_ggn_exact"),
            "kflr": (peer.KFLR, "kflr"),
        }
        worst: dict[str, float] = {}
        for loss, reduction, way in settings(name):
            module, inputs = build(BY_NAME[name])
            targets = targets_for(module(*inputs), loss)
            requests = [*list(peers)[:-1], {"name": "kflr", "options": {"approximation": "backpack"}}]
            script = torchscript(module, inputs, way)
            ours = engine.analyze(script, inputs, targets, requests, loss=loss, reduction=reduction)
            criterion = extend((nn.MSELoss if loss == "mse" else nn.CrossEntropyLoss)(reduction=reduction))
            extended = extend(module)
            for extension, (make, attribute) in peers.items():
                with backpack(make()):
                    criterion(extended(*inputs), targets).backward()
                for parameter, tensor in module.named_parameters():
                    theirs, mine = getattr(tensor, attribute), ours[extension][parameter]
                    pairs = zip(mine, theirs, strict=False) if extension == "kflr" else [(mine, theirs)]
                    row = f"`{extension}`" + (" backpack" if extension == "kflr" else "")
                    worst[row] = max([worst.get(row, 0.0), *(relative_error(a, b) for a, b in pairs)])
    return worst


def table(columns: list[str], cells: Cells, form: Callable[[str, float], str]) -> list[str]:
    """Markdown lines of a table; rows in the order in which cells came."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in dict.fromkeys(row for row, _ in cells):
        values = [form(row, cells[row, column]) if (row, column) in cells else "" for column in columns]
        lines.append(f"| {row} | " + " | ".join(values) + " |")
    return lines


def report() -> tuple[str, bool]:
    """(the report, whether everything is as exact as promised)."""
    started = time.perf_counter()
    cells: Cells = {}
    sampled: Cells = {}
    unequal = []
    for column, name in COLUMNS.items():
        errors, bit_equal = deterministic_errors(name)
        cells |= {(row, column): error for row, error in errors.items()}
        sampled |= {(MONTE_CARLO[row], column): z for row, z in standard_errors(name).items()}
        if not bit_equal:
            unequal.append(column)
    peered: Cells = {}
    for column, name in PEERED.items():
        peered |= {(row, column): error for row, error in backpack_errors(name).items()}
    worst = max([*cells.values(), *peered.values()])
    forward = (
        f"The interpreted forward differs from TorchScript's own on: {', '.join(unequal)}."
        if unequal
        else "The interpreted forward equals TorchScript's own output bit for bit on every model, in every setting."
    )
    lines = [
        "# Exactness",
        "",
        f"Engine {engine.__version__}, torch {torch.__version__}, {platform.machine()}, float64.",
        "",
        "Deterministic rows: largest error relative to the tensor's largest entry, over {cross-entropy, squared error} "
        "× {mean, sum} × {scripted, traced where tracing applies}, against plain autograd with one backward per "
        "sample. Monte-Carlo rows (σ): how many standard errors the mean of "
        f"{DRAWS_PER_SEED * SEEDS:,} draws lies from the exact value, the worst entry of both losses under mean; "
        "below about 4 is chance.",
        "",
        *table(list(COLUMNS), cells | sampled, lambda row, v: f"{v:.1f} σ" if (row, "MLP") in sampled else f"{v:.0e}"),
        "",
        "Against BackPACK 1.7.1, where it runs the eager model:",
        "",
        *table(list(PEERED), peered, lambda row, v: f"{v:.0e}"),
        "",
        forward,
        "",
        f"Worst deterministic cell: {worst:.1e} (limit {TOLERANCE:.0e}). Took {time.perf_counter() - started:.0f} s.",
    ]
    return "\n".join(lines) + "\n", worst <= TOLERANCE and not unequal


def main() -> int:
    parser = argparse.ArgumentParser(description="How exact the engine is.")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    text, exact = report()
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)
    return 0 if exact else 1


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    sys.exit(main())
