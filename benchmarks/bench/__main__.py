"""python -m benchmarks.bench [--quick] [--nets …] [--extensions …] [--peers …] [--output FILE] [--plots FOLDER]."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.cells import Cell, measure
from benchmarks.bench.machine import in_float32, machine, writing_bandwidth
from benchmarks.bench.memory import in_own_process
from benchmarks.bench.memory import table as memory_table
from benchmarks.bench.nets import NETS, parameters_of
from benchmarks.bench.peers import PEERS
from benchmarks.bench.plots import draw
from benchmarks.bench.report import remarks, tables, title
from benchmarks.bench.sizes import cells, left_out
from benchmarks.bench.summary import summary
from benchmarks.bench.timing import Effort
from benchmarks.bench.works import WORKS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="The engine beside its peers.")
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--nets", choices=NETS, default=[*NETS], help=", ".join(NETS), **several)
    parser.add_argument("--extensions", choices=WORKS, default=[*WORKS], help=", ".join(WORKS), **several)
    parser.add_argument("--peers", choices=PEERS, default=[*PEERS], help=", ".join(PEERS), **several)
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="instead of each net's own")
    parser.add_argument("--classes", type=int, nargs="*", default=[25, 50, 100], help="of the sweep on 3C3D")
    parser.add_argument("--threads", type=int, help="torch's own number by default")
    parser.add_argument("--rounds", type=int, default=9, help="at most so many runs of everybody")
    parser.add_argument("--seconds", type=float, default=6.0, help="for a cell; everybody runs once in any case")
    parser.add_argument("--minutes", type=float, default=40.0, help="begin no cell after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well, a process for each")
    parser.add_argument("--quick", action="store_true", help="one round of batches of 2 and no sweep, as a check")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plots", type=Path, help="folder for PNG files")
    return parser.parse_args()


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.place = Place(torch.device(options.device), getattr(torch, options.dtype))
        self.peers = [peer for peer in PEERS if peer in options.peers]
        self.begun = time.perf_counter()
        self.effort = Effort(1 if options.quick else options.rounds, options.seconds)
        sizes = [2] if options.quick and not options.batch_sizes else options.batch_sizes
        self.cells = cells(options.nets, options.extensions, sizes, [] if options.quick else options.classes)
        self.skipped = left_out(options.nets, options.extensions)
        self.measured: list[Cell] = []
        self.memory: list[dict[str, Any]] = []

    def run(self) -> None:
        self.bandwidth = writing_bandwidth(self.place, self.options.quick)
        case: Case | None = None
        for number, sized in enumerate(self.cells):
            if time.perf_counter() - self.begun > self.options.minutes * 60:
                self.skipped[f"{len(self.cells) - number} cells more"] = f"{self.options.minutes:g} minutes are over"
                break
            wanted = Case(sized.net, sized.N, sized.classes, self.place)
            case = case if case == wanted else wanted  # the same module as long as possible
            cell = measure(case, sized.work, self.peers, self.effort, self.bandwidth)
            self.measured.append(cell)
            self._tell(f"{number + 1}/{len(self.cells)}", cell)

    def measure_memory(self) -> None:
        """Of every net and work at its largest batch."""
        timed = sorted((cell for cell in self.measured if cell.seconds), key=lambda cell: cell.N)
        for cell in {(cell.net, cell.classes, cell.work): cell for cell in timed}.values():
            case = Case(cell.net, cell.N, cell.classes, self.place)
            for who in cell.seconds:
                found = in_own_process(case, cell.work, who)
                self.memory.append({"net": cell.net, "N": cell.N, "work": cell.work, "who": who, **found})

    def _tell(self, number: str, cell: Cell) -> None:
        elapsed = (time.perf_counter() - self.begun) / 60
        ours = f"{cell.gradients['ours']:.2f} gradients" if cell.seconds else cell.wrong.get("ours", "")
        ratios = " ".join(f"{peer} {ratio:.2f}" for peer, ratio in cell.ratios.items()) if cell.seconds else ""
        wrong = f" WRONG: {cell.wrong}" if cell.wrong else ""
        print(f"{elapsed:5.1f} min {number} {title(cell)} {cell.work}: {ours} {ratios}{wrong}", file=sys.stderr)

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": {**machine(self.place), "writing_bytes_per_second": self.bandwidth},
            "settings": {k: v for k, v in vars(self.options).items() if not isinstance(v, Path)},
            "parameters": {net: parameters_of(net) for net in self.options.nets},
            "minutes": (time.perf_counter() - self.begun) / 60,
            "cells": [cell.as_json() for cell in self.measured if cell.seconds],
            "not_timed": [
                {"net": c.net, "N": c.N, "work": c.work, "unable": c.unable, "wrong": c.wrong} for c in self.measured
            ],
            "skipped": self.skipped,
            "memory": self.memory,
            "summary": list(summary(self.measured, self.peers)),
        }

    def text(self) -> str:
        facts = ", ".join(f"{k} {v}" for k, v in machine(self.place).items())
        lines = ["# The engine beside its peers", "", f"{facts}, {self.bandwidth / 1e9:.1f} GB/s written by a copy."]
        lines += [*tables(self.measured, self.peers), *remarks(self.measured, self.skipped)]
        return "\n".join([*lines, "\n## Summary", *summary(self.measured, self.peers)])


def main() -> int:
    options = arguments()
    # Opacus brings opt_einsum, with which everybody's torch.einsum would add in another order.
    torch.backends.opt_einsum.enabled = False
    in_float32()
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.run()
    print(bench.text(), flush=True)
    if options.memory:
        bench.measure_memory()
        print("\n".join(["\n## Peak memory, MB\n", *memory_table(bench.memory)]))
    if options.output:
        options.output.write_text(json.dumps(bench.as_json(), indent=1))
    if options.plots:
        draw(bench.measured, options.plots)
    return 1 if any(cell.wrong for cell in bench.measured) else 0


if __name__ == "__main__":
    sys.exit(main())
