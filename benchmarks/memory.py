"""Peak memory of large results and many columns: the engine under a byte budget, each case in a process of its own.

The budget covers what an analysis makes: graph, gradients, intermediates, results held in memory. It does not cover the
process with torch imported, the model and the batch, which are measured apart. Peaks are the kernel's count of
resident pages (VmHWM). Prints a table in Markdown and writes JSON with `--output`; `--folder` names where results of
several GB may lie for a while.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 10**9


def deep(width=4096, layers=6, classes=10):
    from torch import nn

    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, classes))


def convolutions(classes):
    from torch import nn

    channels = (3, 64, 128, 256)
    parts = []
    for before, after in itertools.pairwise(channels):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


CASES = {
    "batch_grad, 101 M parameters": (lambda: deep(), (32, 4096), 10, "batch_grad", 2 * GB),
    "diag_ggn_exact, C = 10": (lambda: convolutions(10), (32, 3, 32, 32), 10, "diag_ggn_exact", 1 * GB),
    "diag_ggn_exact, C = 1,000": (lambda: convolutions(1000), (32, 3, 32, 32), 1000, "diag_ggn_exact", 1 * GB),
}


def resident(name):
    """`VmRSS` now or `VmHWM` at most, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def write_model(case, path):
    """In a process of its own: what making it takes is nobody's business here."""
    import torch

    make, shape, classes, *_ = CASES[case]
    torch.manual_seed(0)
    module = make()
    torch.jit.save(torch.jit.script(module), path)
    generator = torch.Generator().manual_seed(1)
    torch.save((torch.randn(shape, generator=generator), torch.arange(shape[0]) % classes), path.with_suffix(".batch"))


def measure(case, folder):
    """Run one case; its figures."""
    import torch

    import curvature_engine as engine

    *_, extension, budget = CASES[case]
    path = folder / "model.pt"
    imported = resident("VmRSS")
    program = engine.load(path)
    inputs, targets = torch.load(path.with_suffix(".batch"))
    loaded = resident("VmRSS")
    plan = engine.plan(program, inputs, targets, [extension], budget_bytes=budget)
    Path("/proc/self/clear_refs").write_text("5")  # let the peak be counted from here
    begun = time.perf_counter()
    analysis = engine.analyze(program, inputs, targets, [extension], budget_bytes=budget, results_dir=folder)
    seconds = time.perf_counter() - begun
    peak = resident("VmHWM")
    assert analysis.plan == plan
    return {
        "parameters": sum(p.tensor.numel() for p in program.parameters.values()),
        "budget_bytes": budget,
        "result_bytes": plan.result_bytes,
        "streamed": list(plan.streamed),
        "imported_bytes": imported,
        "model_and_batch_bytes": loaded - imported,
        "peak_bytes": peak,
        "above_bytes": peak - loaded,
        "planned_bytes": plan.peak_bytes,
        "columns": plan.columns,
        "seconds": seconds,
        "worst_error": worst_error(path, analysis, inputs, targets, extension),
    }


def worst_error(path, analysis, inputs, targets, extension):
    """Against plain autograd: some samples' gradients; or the last layer's diagonal, written by hand."""
    import torch

    module = torch.jit.load(path)
    parameters = dict(module.named_parameters())
    names = [name for name in parameters if name.endswith("weight")]
    worst = 0.0
    if extension == "batch_grad":
        for n in (0, 17, 31):
            loss = torch.nn.functional.cross_entropy(module(inputs[n : n + 1]), targets[n : n + 1]) / len(inputs)
            for name, g in zip(names, torch.autograd.grad(loss, [parameters[k] for k in names]), strict=True):
                worst = max(worst, float((analysis[extension][name][n] - g).abs().max() / g.abs().max()))
        return worst
    # The last layer's diagonal in closed form: Σ_n p_c (1 − p_c) x_ni² / N, with x its inputs and p the softmax.
    name = names[-1]
    layers = list(module.children())
    with torch.no_grad():
        x = inputs
        for layer in layers[:-1]:
            x = layer(x)
        p = layers[-1](x).softmax(1)
        expected = (p * (1 - p)).T @ x.square() / len(inputs)
    return float((analysis[extension][name] - expected).abs().max() / expected.abs().max())


def in_own_process(case, folder, task):
    command = [sys.executable, "-W", "ignore", __file__, "--case", case, "--folder", str(folder), "--task", task]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(figures):
    heads = "parameters", "result", "budget", "process, torch", "model, batch", "peak", "above", "planned", "s", "error"
    yield f"| | {' | '.join(heads)} |"
    yield "| --- " + "| ---: " * 10 + "|"
    for case, f in figures.items():
        cells = [f"{f['parameters'] / 1e6:.1f} M", *(f"{f[k] / GB:.2f}" for k in ("result_bytes", "budget_bytes"))]
        cells += [f"{f[k] / GB:.2f}" for k in ("imported_bytes", "model_and_batch_bytes", "peak_bytes", "above_bytes")]
        cells += [f"{f['planned_bytes'] / GB:.2f}", f"{f['seconds']:.0f}", f"{f['worst_error']:.0e}"]
        yield f"| {case} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--task", choices=["write", "measure"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.task == "write":
        write_model(arguments.case, arguments.folder / "model.pt")
        return
    if arguments.task == "measure":
        print(json.dumps(measure(arguments.case, arguments.folder)))
        return
    figures = {}
    for case in [arguments.case] if arguments.case else CASES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            in_own_process(case, folder, "write")
            figures[case] = json.loads(in_own_process(case, folder, "measure"))
        print(case, figures[case], file=sys.stderr)
    print("\n".join(table(figures)))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
