"""python benchmarks/gpu.py [--minutes M] [--output FILE]: what only a machine with a GPU can show.

1. `correctness`: every extension in float32 on the GPU beside float64 on the CPU.
2. `kernels`: fused kernels beside their plain forms, equality and seconds, on both sides of the thresholds in
   `curvature_engine.kernels.choice`.
3. `precision`: what TF32, bfloat16 and channels-last change and save.
4. `waits`: how often a warm analysis makes the host wait for the device.
5. `graphs`: what a captured CUDA graph and `torch.compile` would save of one plain gradient, and what they cost at
   first. The engine uses neither: this says where it would pay.
6. `busy`: how long warm analyses take, and how long the device is busy with them, and with what.
7. `bench`: the engine beside its peers (`python -m benchmarks.bench`), in the minutes that are left.

Without a GPU it says so and ends. The JSON is written anew after every section.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench.cases import Place  # noqa: E402
from benchmarks.bench.machine import in_float32, machine  # noqa: E402
from benchmarks.gpu_checks.busy import busy  # noqa: E402
from benchmarks.gpu_checks.correctness import correctness  # noqa: E402
from benchmarks.gpu_checks.graphs import graphs  # noqa: E402
from benchmarks.gpu_checks.kernels import kernels  # noqa: E402
from benchmarks.gpu_checks.precision import precision  # noqa: E402
from benchmarks.gpu_checks.waits import waits  # noqa: E402

SECTIONS = {
    "correctness": correctness,
    "kernels": kernels,
    "precision": precision,
    "waits": waits,
    "graphs": graphs,
    "busy": busy,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description="What only a machine with a GPU can show.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, the benchmark's included")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON")
    parser.add_argument("--only", choices=[*SECTIONS, "bench"], nargs="+", default=[*SECTIONS, "bench"])
    parser.add_argument("--device", default="cuda", help="cpu: only to see that this script runs")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked")
        return
    begun = time.perf_counter()
    in_float32()
    place = Place(torch.device(options.device), torch.float32)
    found: dict[str, Any] = {"machine": machine(place)}
    for name in options.only:
        left = options.minutes - (time.perf_counter() - begun) / 60
        if left <= 0:
            found.setdefault("left out", []).append(name)
            continue
        try:
            found[name] = bench(options, left) if name == "bench" else SECTIONS[name](place, options.quick)
        except Exception as error:  # noqa: BLE001 (the other sections are worth having all the same)
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"\n== {name} ==\n{json.dumps(found[name], indent=1, ensure_ascii=False)}", flush=True)
        options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    if wrong := failures(found):
        print("\nFAILED: " + ", ".join(wrong))
        sys.exit(1)
    print(f"\nwritten to {options.output}")


def bench(options: argparse.Namespace, minutes: float) -> Any:
    """The engine beside its peers, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench", "--device", options.device]
        command += ["--minutes", f"{minutes:g}", "--seconds", "3", "--output", str(output)]
        command += ["--quick"] if options.quick else ["--batch-sizes", "128"]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(output.read_text())


def failures(found: dict[str, Any]) -> list[str]:
    """Sections that failed, or found something wrong."""
    sections = {name: section for name, section in found.items() if isinstance(section, dict)}
    return [name for name, section in sections.items() if section.get("failed") or section.get("wrong")]


if __name__ == "__main__":
    main()
