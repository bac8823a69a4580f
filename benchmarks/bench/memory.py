"""Peak memory of one work of one net, by whom: each in a process of its own, which runs it once.

On a CPU the growth of resident memory over what the process held with model and batch (VmHWM); on CUDA what the
allocator counts. The engine's figure includes its probe, which later calls do without.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.gradient import unit
from benchmarks.bench.jobs import Job, reason
from benchmarks.bench.ours import ours
from benchmarks.bench.peers import PEERS
from benchmarks.bench.works import WORKS


def in_own_process(case: Case, work: str, who: str) -> dict[str, Any]:
    """{"bytes": …} or {"unable": why}."""
    place = case.place
    asked = [case.name, str(case.N), str(case.classes), work, who, str(place.device), str(place.dtype).split(".")[1]]
    # Freed blocks go back to the system, so that the peak is what is held and not what was.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench.memory", *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return {"unable": said[:160]}
    return json.loads(done.stdout.splitlines()[-1])


def job_of(case: Case, work: str, who: str) -> Job:
    if who == "unit":
        return unit(case)
    return (ours if who == "ours" else PEERS[who])(case, WORKS[work])


def peak_bytes(case: Case, work: str, who: str) -> int:
    """Of one run, over what was held before."""
    job = job_of(case, work, who)
    unit(Case(case.name, 1, case.classes, case.place)).run(None)  # libraries load what they need
    assert case.inputs is not None
    assert case.targets is not None
    gc.collect()
    if case.place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = job.run(None)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # let the peak be counted from here
        found = job.run(None)
        peak = resident("VmHWM")
    del found
    return peak - before


def resident(name: str) -> int:
    """`VmRSS` now or `VmHWM` at most, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Markdown, in MB."""
    whos = list(dict.fromkeys(f["who"] for f in figures if "bytes" in f))
    lines = [f"| | {' | '.join(whos)} |", f"| --- |{' ---: |' * len(whos)}"]
    for net, N, work in dict.fromkeys((f["net"], f["N"], f["work"]) for f in figures):
        of = {f["who"]: f["bytes"] for f in figures if (f["net"], f["N"], f["work"]) == (net, N, work) and "bytes" in f}
        values = " | ".join(f"{of[who] / 1e6:,.0f}" if who in of else "" for who in whos)
        lines.append(f"| {net}, N = {N}, `{work}` | {values} |")
    return lines


def main() -> None:
    net, N, classes, work, who, device, dtype = sys.argv[1:]
    torch.backends.opt_einsum.enabled = False
    case = Case(net, int(N), int(classes), Place(torch.device(device), getattr(torch, dtype)))
    try:
        print(json.dumps({"bytes": peak_bytes(case, work, who)}))
    except Exception as error:  # noqa: BLE001 - told in one line
        print(json.dumps({"unable": reason(error)}))


if __name__ == "__main__":
    main()
