"""What a small warm job costs beyond its computation: `client.analyze` against the engine called directly, by step.

Starts an embedded server of its own; one thread for the computation on both sides. Prints a table of medians in
milliseconds and writes JSON with `--output`.
"""

import argparse
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import curvature_engine as engine
from curvature_client import Client
from curvature_client._batches import Batch
from curvature_client._conversion import convert

STEPS = {
    "convert": "client: script to bytes, batch to safetensors, hashes",
    "queue": "row written, bell rung, job claimed",
    "fetch": "files found in the worker's cache",
    "hand_over": "files and order to the child",
    "load": "child: program from its cache, batch read",
    "compute": "child: the engine",
    "write": "child: safetensors written",
    "check": "worker: files checked, manifest made",
    "store": "worker: files stored",
    "rest": "HTTP, validation, waking the waiting request, reply and its parsing",
}


@contextmanager
def server():
    """`curvature serve` on a free port and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).with_name("curvature"), "serve", "--port", "0", "--threads", "1"]
        process = subprocess.Popen([*command, "--data-dir", folder], stdout=subprocess.PIPE, text=True)
        try:
            yield next(m[1] for line in process.stdout if (m := re.search(r"ready at (\S+)", line)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def milliseconds(call):
    begun = time.perf_counter()
    value = call()
    return 1e3 * (time.perf_counter() - begun), value


def measure(rounds):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    script = torch.jit.script(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)).eval())
    batch = torch.randn(32, 20), torch.randint(0, 5, (32,))
    program = engine.load(script)
    direct, total, steps = [], [], {name: [] for name in STEPS}
    with server() as url, Client(url) as client, tempfile.TemporaryDirectory() as folder:
        for _ in range(20):
            client.analyze(script, batch, ["diag_ggn_mc"])
            engine.analyze(program, *batch, ["diag_ggn_mc"])
        for _ in range(rounds):
            direct.append(milliseconds(lambda: engine.analyze(program, *batch, ["diag_ggn_mc"]))[0])
            steps["convert"].append(milliseconds(lambda: prepare(script, batch, Path(folder)))[0])
            spent, result = milliseconds(lambda: client.analyze(script, batch, ["diag_ggn_mc"]))
            total.append(spent)
            timings = result.manifest.timings_ms
            for name in STEPS:
                if name in timings:
                    steps[name].append(timings[name])
            within = sum(timings[n] for n in ("queue", "fetch", "hand_over", "child", "check", "store"))
            steps["rest"].append(spent - steps["convert"][-1] - within)
    medians = {name: statistics.median(values) for name, values in steps.items()}
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "rounds": rounds,
        "engine_ms": statistics.median(direct),
        "analyze_ms": statistics.median(total),
        "overhead_ms": statistics.median(total) - statistics.median(direct),
        "steps_ms": medians,
    }


def prepare(script, batch, folder):
    given = Batch(batch)
    convert(script, given, folder, eval=True)
    given.payload(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(f"| step | median ms | what |\n| --- | ---: | --- |\n| engine alone | {found['engine_ms']:.2f} | |")
    print(f"| client.analyze | {found['analyze_ms']:.2f} | one request |")
    print(f"| **overhead** | **{found['overhead_ms']:.2f}** | |")
    for name, value in found["steps_ms"].items():
        print(f"| {name} | {value:.2f} | {STEPS[name]} |")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
