"""How cost grows with the batch and with the number of classes: straight lines, and how far off the times are."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.bench.cells import Cell

LEAST_POINTS = 3
BY_CLASSES = ("diag_ggn_exact", "kflr")
"""What has a column for every class."""


@dataclass(frozen=True)
class Line:
    """Seconds as `start + slope · size`, and the largest deviation from that, relative to the time."""

    start: float
    slope: float
    deviation: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> "Line":
        """The line with the least squared relative errors: sizes far apart count alike."""
        weights = [1 / seconds**2 for _, seconds in points]
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = sum(w * (x - mean_x) * y for w, (x, y) in zip(weights, points, strict=True)) / spread
        start = mean_y - slope * mean_x
        return cls(start, slope, max(abs(start + slope * x - y) / y for x, y in points))


def growth(cells: list[Cell]) -> Iterator[str]:
    """The lines, as a list in Markdown."""
    by_size: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    by_classes: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for cell in cells:
        if cell.seconds:
            by_size.setdefault((cell.net, cell.classes, cell.work), []).append((cell.N, cell.seconds["ours"]))
            by_classes.setdefault((cell.net, cell.N, cell.work), []).append((cell.classes, cell.seconds["ours"]))
    lines = [
        (f"`{work}` on {net} over N = {_sizes(points)}", Line.through(points))
        for (net, _, work), points in by_size.items()
        if len({x for x, _ in points}) >= LEAST_POINTS
    ]
    if lines:
        where, worst = max(lines, key=lambda pair: pair[1].deviation)
        middle = median(line.deviation for _, line in lines)
        yield f"- over N, {len(lines)} lines: times deviate by {middle:.0%} (median), {worst.deviation:.0%} ({where})"
    for (net, N, work), points in by_classes.items():
        if work in BY_CLASSES and len({x for x, _ in points}) >= LEAST_POINTS:
            line = Line.through(points)
            told = f"{line.start * 1e3:.1f} ms + {line.slope * 1e3:.2f} ms · C"
            yield f"- `{work}` on {net}, N = {N}, over C = {_sizes(points)}: {told}, at most {line.deviation:.0%} off"


def _sizes(points: list[tuple[int, float]]) -> str:
    return ", ".join(str(x) for x, _ in sorted(points))
