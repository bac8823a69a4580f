"""Who is waited for: how long a warm analysis takes, and how long the device is busy with it, and with what."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.cells import WARM
from benchmarks.bench.gradient import unit
from benchmarks.bench.nets import NETS
from benchmarks.bench.ours import ours
from benchmarks.bench.works import WORKS
from benchmarks.gpu_checks.attempts import attempt, failed
from benchmarks.gpu_checks.clock import seconds

NAMES = ("grad", "batch_l2", "variance", "sum_grad_squared", "diag_ggn_mc", "diag_ggn_mc+grad", "kfac", "kflr")
EXACT = ("diag_ggn_exact",)
DEAREST = 10
"""Kernels named per work."""


def busy(place: Place, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for net in ["3c3d"] if quick else NETS:
        case = Case(net, 2 if quick else 8 if net == "gpt" else 128, NETS[net].classes, place)
        found[f"{net}, N = {case.N}"] = table = {"one gradient": attempt(lambda case=case: _gradient(case))}
        for name in (*NAMES, *EXACT):
            if name in WORKS and (case.positions == 1 or name not in (*EXACT, "kflr")):
                table[name] = attempt(lambda case=case, name=name: _work(case, name))
        wrong += [f"{net} {name}" for name, line in table.items() if failed(line)]
    return {**found, "wrong": wrong}


def _gradient(case: Case) -> dict[str, Any]:
    job = unit(case)
    return _of(lambda: job.run(None), case.place)


def _work(case: Case, name: str) -> dict[str, Any]:
    job = ours(case, WORKS[name])
    for _ in range(1 + WARM[case.place.device.type]):
        job.run(None)
    return _of(lambda: job.run(None), case.place)


def _of(run: Callable[[], object], place: Place) -> dict[str, Any]:
    """Seconds of one run; and of the device, where there is one: its kernels' number, their sum and the dearest."""
    found: dict[str, Any] = {"seconds": seconds(run, place, 5)}
    if place.device.type != "cuda":
        return found
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        place.synchronize()
    spent: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[event.name] += event.device_time / 1e6
            number[event.name] += 1
    found |= {"device": sum(spent.values()), "kernels": sum(number.values())}
    found["dearest"] = [f"{1e3 * s:.3f} ms in {number[name]}: {name[:90]}" for name, s in spent.most_common(DEAREST)]
    return found
