"""The figures in a few lines: how many times faster, and how near the floors."""

from collections.abc import Iterator
from statistics import geometric_mean, median

from benchmarks.bench.cells import Cell
from benchmarks.bench.growth import growth
from benchmarks.bench.peers import TITLES
from benchmarks.bench.report import title

AGAINST_FLOORS = (
    *("diag_ggn_mc", "diag_ggn_mc+grad", "variance", "batch_l2", "batch_grad"),
    *("diag_ggn_exact", "kfac", "kflr"),
)
Rated = list[tuple[float, Cell]]


def rated(cells: list[Cell], peer: str) -> Rated:
    return [(cell.ratios[peer], cell) for cell in cells if cell.seconds and peer in cell.ratios]


def summary(cells: list[Cell], peers: list[str]) -> Iterator[str]:
    for peer in peers:
        found = rated(cells, peer)
        if not found:
            continue
        yield f"\n**{TITLES[peer]}'s time / ours**, geometric means:"
        works = list(dict.fromkeys(cell.work for _, cell in found))
        yield from (f"- `{work}`: {_told([pair for pair in found if pair[1].work == work])}" for work in works)
        yield f"- overall: {_told(found)}"
    yield "\n**Ours in gradients** (floor):"
    yield from (f"- `{work}`: {line}" for work in AGAINST_FLOORS if (line := near_floor(cells, work)))
    if line := all_against_dearest(cells):
        yield f"\n**The five first-order quantities together**: {line}"
    if lines := list(growth(cells)):
        yield "\n**Growth** (straight lines by least squared relative errors):"
        yield from lines


def _told(found: Rated) -> str:
    lowest, cell = min(found, key=lambda pair: pair[0])
    mean = geometric_mean([ratio for ratio, _ in found])
    behind = sum(ratio < 1 for ratio, _ in found)
    return (
        f"{mean:.2f} over {len(found)} cases, lowest {lowest:.2f} ({title(cell)}, `{cell.work}`)"
        f"{f', {behind} below 1' if behind else ''}"
    )


def near_floor(cells: list[Cell], work: str) -> str:
    """Every net at its largest batch."""
    largest: dict[str, Cell] = {}
    for cell in cells:
        if cell.work == work and cell.seconds and (cell.net not in largest or cell.N > largest[cell.net].N):
            largest[cell.net] = cell
    return "; ".join(f"{title(c)}: {c.gradients['ours']:.2f} ({_floor(c)})" for c in largest.values())


def _floor(cell: Cell) -> str:
    return " or ".join(f"{floor:.2f}" for floor in cell.floors.values())


def all_against_dearest(cells: list[Cell]) -> str:
    """Together against the dearest alone, on the same net and batch."""
    ours = {(c.net, c.N, c.classes, c.work): c.gradients["ours"] for c in cells if c.seconds}
    lines, factors = [], []
    for (net, N, classes, work), together in ours.items():
        names = ("grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance")
        alone = {name: ours[net, N, classes, name] for name in names if (net, N, classes, name) in ours}
        if work == "first_order" and len(alone) == len(names):
            dearest = max(alone, key=lambda name: alone[name])
            factors.append(together / alone[dearest])
            lines.append(f"{net} N = {N}: {together:.2f} against {alone[dearest]:.2f} (`{dearest}`)")
    return f"median {median(factors):.2f} times the dearest alone; {'; '.join(lines)}" if factors else ""
