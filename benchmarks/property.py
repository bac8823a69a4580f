"""Random nets, every extension, against brute force: how many, what was refused, and the worst errors.

    python benchmarks/property.py [--nets 2000] [--first 0]

Prints Markdown. A net is a function of its seed (`tests/engine/random_nets.py`); an error is relative to the tensor's
largest entry, in float64. Exits with 1 if any number is wrong, or anything was refused that should not be, after
printing the nets.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.engine.property_check import Findings, check
from tests.engine.random_blocks import BLOCKS, COUPLERS
from tests.engine.random_nets import Net, random_net


def main() -> int:
    """Run all nets; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    torch.set_num_threads(1)
    started = time.perf_counter()
    found: list[tuple[Net, Findings]] = []
    wrong: list[tuple[int, Exception]] = []
    for seed in range(arguments.first, arguments.first + arguments.nets):
        try:
            net = random_net(seed, BLOCKS, COUPLERS)
            found.append((net, check(net)))
        except Exception as error:  # noqa: BLE001 (a net that fails is what this looks for; go on to the next)
            wrong.append((seed, error))
            print(f"net {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    report(found, wrong, time.perf_counter() - started)
    return 1 if wrong else 0


def report(found: list[tuple[Net, Findings]], wrong: list[tuple[int, Exception]], seconds: float) -> None:
    """Print the tables."""
    refused = sum(f.refused for _, f in found)
    ways = Counter(net.way for net, f in found if not f.refused)
    print(
        f"{len(found) + len(wrong)} nets in {seconds:.0f} s: {len(found) - refused} computed "
        f"({', '.join(f'{n} {way}' for way, n in sorted(ways.items()))}), {refused} refused as expected, "
        f"{len(wrong)} wrong."
    )
    print("\n| refused because | nets |\n| --- | ---: |")
    for reason, count in Counter(r for _, f in found for r in set(f.refusals)).most_common():
        print(f"| {reason} | {count} |")
    worst: dict[str, float] = {}
    checked: Counter[str] = Counter()
    for _, findings in found:
        checked.update(findings.errors)
        for extension, error in findings.errors.items():
            worst[extension] = max(worst.get(extension, 0.0), error)
    print("\n| quantity | nets | worst error |\n| --- | ---: | ---: |")
    for extension, error in worst.items():
        print(f"| {extension} | {checked[extension]} | {error:.0e} |")
    for seed, error in wrong:
        print(f"\nnet {seed}: {type(error).__name__}: {error}\n{random_net(seed, BLOCKS, COUPLERS)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
