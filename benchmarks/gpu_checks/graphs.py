"""One plain gradient: as it is, as a captured CUDA graph, and compiled; and what the first call of each costs.

The engine does neither. A graph replays one batch shape on one path, needs its inputs copied into fixed places, keeps
its memory, and cannot be captured where the program decides by data; compiling costs seconds before the first result.
What they would save at most is the difference shown here, in relation to the engine's own time for the same gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.nets import NETS
from benchmarks.gpu_checks.clock import once, seconds
from torch import Tensor

import curvature_engine as engine

COMPILED = ("3c3d", 32)
"""Compiling takes its time: one case says whether it could pay."""


def graphs(place: Place, quick: bool) -> dict[str, Any]:
    found = {}
    for net in ["3c3d"] if quick else ["2c2d", "3c3d", "allcnnc"]:
        for N in (2,) if quick else (8, 32, 128):
            case = Case(net, N, NETS[net].classes, place)
            found[f"{net}, N = {N}"] = _measure(case, place, compiled=(net, N) == COMPILED)
    return found


def _measure(case: Case, place: Place, *, compiled: bool) -> dict[str, Any]:
    parameters = list(case.module.parameters())
    module: Any = case.module

    def gradient(forward: Any = module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(forward(case.inputs), case.targets), parameters)

    program = engine.load(case.module, device=place.device)
    found: dict[str, Any] = {
        "eager": seconds(gradient, place),
        "engine": seconds(lambda: engine.analyze(program, case.inputs, case.targets, ["grad"]), place),
    }
    if place.device.type != "cuda":
        return found
    captured: list[Any] = []
    found["capture"] = once(lambda: captured.append(_capture(gradient)), place)
    graph, results = captured[0]
    found["graph"] = seconds(graph.replay, place)
    graph.replay()
    place.synchronize()
    found["equal"] = all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(results, gradient(), strict=True))
    if compiled:
        forward = torch.compile(case.module)
        found["compile"] = once(lambda: gradient(forward), place)
        found["compiled"] = seconds(lambda: gradient(forward), place)
    return found


def _capture(run: Any) -> tuple[Any, Any]:
    """A graph of `run`, after warming up on a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results
