"""Random nets, every extension, against brute force: how many, what was refused, and the worst errors.

    python benchmarks/property.py [--nets 2000] [--first 0] [--jobs 2]

Prints Markdown. A net is a function of its seed (`tests/engine/random_nets.py`); an error is relative to the tensor's
largest entry, in float64. Exits with 1 if any number is wrong, or anything was refused that should not be, after
printing the nets.
"""

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.engine.property_check import Findings, check
from tests.engine.random_blocks import BLOCKS, COUPLERS
from tests.engine.random_nets import random_net


@dataclass(frozen=True)
class Outcome:
    """What became of one net; `failure` says what was wrong, with the net's text."""

    way: str
    findings: Findings
    failure: str | None = None


def main() -> int:
    """Run all nets; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    started = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.nets)
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, initializer=prepare) as pool:
        outcomes = []
        for outcome in pool.imap_unordered(outcome_of, seeds, chunksize=4):
            outcomes.append(outcome)
            if outcome.failure is not None:
                print(outcome.failure, file=sys.stderr, flush=True)
    report(outcomes, time.perf_counter() - started)
    return 1 if any(o.failure is not None for o in outcomes) else 0


def prepare() -> None:
    """Set one process up."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")


def outcome_of(seed: int) -> Outcome:
    """Make and check one net."""
    net = random_net(seed, BLOCKS, COUPLERS)
    try:
        return Outcome(net.way, check(net))
    except Exception as error:  # noqa: BLE001 (a net that fails is what this looks for; go on to the next)
        return Outcome(net.way, Findings(), f"{type(error).__name__}: {error}\n{net}")


def report(outcomes: list[Outcome], seconds: float) -> None:
    """Print the tables."""
    right = [o for o in outcomes if o.failure is None]
    refused = sum(o.findings.refused for o in right)
    ways = Counter(o.way for o in right if not o.findings.refused)
    print(
        f"{len(outcomes)} nets in {seconds:.0f} s: {len(right) - refused} computed "
        f"({', '.join(f'{n} {way}' for way, n in sorted(ways.items()))}), {refused} refused as expected, "
        f"{len(outcomes) - len(right)} wrong; {sum(o.findings.replayed > 0 for o in right)} by graphs of other batches."
    )
    print("\n| refused because | nets |\n| --- | ---: |")
    for reason, count in Counter(r for o in right for r in set(o.findings.refusals)).most_common():
        print(f"| {reason} | {count} |")
    worst: dict[str, float] = {}
    checked: Counter[str] = Counter()
    for outcome in right:
        checked.update(outcome.findings.errors.keys())
        for extension, error in outcome.findings.errors.items():
            worst[extension] = max(worst.get(extension, 0.0), error)
    print("\n| quantity | nets | worst error |\n| --- | ---: | ---: |")
    for extension, error in sorted(worst.items()):
        print(f"| {extension} | {checked[extension]} | {error:.0e} |")


if __name__ == "__main__":
    sys.exit(main())
