"""Tables in Markdown."""

from collections.abc import Iterator

from benchmarks.bench.cells import UNIT, Cell
from benchmarks.bench.nets import NETS
from benchmarks.bench.peers import TITLES


def title(cell: Cell) -> str:
    net = NETS[cell.net]
    classes = "" if cell.classes == net.classes else f", C = {cell.classes}"
    return f"{net.title}{classes}, N = {cell.N}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def tables(cells: list[Cell], peers: list[str]) -> Iterator[str]:
    """One table a net and batch: ours in gradients beside its floor, every peer's time as a multiple of ours."""
    for group in dict.fromkeys(title(cell) for cell in cells):
        members = [cell for cell in cells if title(cell) == group]
        columns = [peer for peer in peers if any(peer in cell.ratios for cell in members)]
        heads = ["extension", "gradient, ms", "ours, ms", "ours, gradients", "floor"]
        heads += [f"{TITLES[peer]} / ours" for peer in columns]
        yield f"\n## {group}\n"
        yield f"| {' | '.join([*heads, 'rounds'])} |"
        yield f"| --- |{' ---: |' * len(heads)}"
        for cell in members:
            if cell.seconds:
                yield row(cell, columns)


def row(cell: Cell, columns: list[str]) -> str:
    floor = f"{cell.floors['floor']:.2f}" if "floor" in cell.floors else ""
    times = [milliseconds(cell.seconds[who]) for who in (UNIT, "ours")]
    ratios = [f"{cell.ratios[peer]:.2f}" if peer in cell.ratios else "" for peer in columns]
    cells = [f"`{cell.work}`", *times, f"{cell.gradients['ours']:.2f}", floor, *ratios, rounds(cell)]
    return f"| {' | '.join(cells)} |"


def rounds(cell: Cell) -> str:
    """Of ours; and of who ran least, if that was less often."""
    least = min(cell.rounds.values())
    return f"{cell.rounds['ours']}" + (f" (≥ {least})" if least < cell.rounds["ours"] else "")


def remarks(cells: list[Cell], skipped: dict[str, str]) -> Iterator[str]:
    """Who could not, and why: a line for each reason; and what is wrong."""
    kinks = [
        f"{title(c)}, `{c.work}`, {TITLES[who]}: {c.errors[who]:.0e} in float32, {error:.0e} in float64"
        for c in cells
        for who, error in c.in_float64.items()
    ]
    if kinks:
        yield "\nDifferences where a ReLU's input is a rounding error from zero, gone in float64:\n"
        yield from (f"- {line}" for line in kinks)
    wrong = [f"{title(c)}, {c.work}, {TITLES[who]}: {said}" for c in cells for who, said in c.wrong.items()]
    if wrong:
        yield "\n## Wrong, and therefore not timed\n"
        yield from (f"- {line}" for line in wrong)
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for who, said in cell.unable.items():
            found = reasons.setdefault((TITLES[who], said), [])
            found += [name for name in (f"{NETS[cell.net].title} {cell.work}",) if name not in found]
    yield "\n## Not measured\n"
    for (who, said), where in reasons.items():
        shown = ", ".join(where) if len(where) <= 6 else f"{len(where)} cases, {', '.join(where[:3])} among them"
        yield f"- {who}: {said} ({shown})"
    yield from (f"- {what}: {why}" for what, why in skipped.items())
