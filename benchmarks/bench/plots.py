"""Overhead in gradients, like figure 6 of BackPACK's paper; cost against batch size and number of classes."""

from pathlib import Path
from typing import Any

from benchmarks.bench.cells import Cell
from benchmarks.bench.nets import NETS
from benchmarks.bench.peers import TITLES
from benchmarks.bench.sizes import SWEPT

COLOURS = {
    **{"ours": "#1b6ca8", "backpack": "#d1603d", "opacus": "#8a6fb0", "curvlinops": "#5b8c5a"},
    **{"functional": "#c9a227", "naive": "#8c8c8c", "gradient": "#444444", "ordinary": "#b0c4de"},
}
NOT_DRAWN = {"outputs", "batch_loss", "grad"}


def draw(cells: list[Cell], folder: Path) -> list[Path]:
    """All plots as PNG files."""
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [cell for cell in cells if cell.seconds]
    usual = [cell for cell in timed if cell.classes == NETS[cell.net].classes]
    paths = []
    for net in dict.fromkeys(cell.net for cell in usual):
        of_net = [cell for cell in usual if cell.net == net]
        paths.append(overheads(of_net, folder / f"overhead_{net}.png"))
        if len({cell.N for cell in of_net}) > 1:
            paths.append(curves(of_net, "N", folder / f"batch_size_{net}.png"))
    swept = [cell for cell in timed if cell.net == "3c3d" and cell.work in SWEPT]
    if other := {cell.N for cell in swept if cell.classes != NETS["3c3d"].classes}:
        same_batch = [cell for cell in swept if cell.N in other]
        paths.append(curves(same_batch, "classes", folder / "classes_3c3d.png"))
    return paths


def overheads(cells: list[Cell], path: Path) -> Path:
    """Bars in units of one gradient, at each work's largest batch."""
    largest = {c.work: c for c in sorted(cells, key=lambda c: c.N) if c.work not in NOT_DRAWN}
    shown = list(largest.values()) or cells
    whos = [who for who in COLOURS if any(who in cell.gradients for cell in shown)]
    figure, grid = _figure(max(6.0, 0.6 * len(shown)), 4.5)
    axes = grid[0][0]
    width = 0.8 / max(1, len(whos))
    for place, who in enumerate(whos):
        left = (place - (len(whos) - 1) / 2) * width
        bars = {i + left: c.gradients[who] for i, c in enumerate(shown) if who in c.gradients}
        axes.bar([*bars], [*bars.values()], width, label=TITLES[who], color=COLOURS[who])
    for i, cell in enumerate(shown):
        if "floor" in cell.floors:
            axes.hlines(cell.floors["floor"], i - 0.42, i + 0.42, color="black", linewidth=1)
    axes.axhline(1, color="black", linewidth=0.5, linestyle=":")
    axes.set_yscale("log")
    axes.set_xticks(range(len(shown)), [f"{c.work}\nN = {c.N}" for c in shown], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("time in gradients (line: floor)")
    axes.set_title(NETS[shown[0].net].title)
    return _saved(figure, axes, path)


def curves(cells: list[Cell], axis: str, path: Path) -> Path:
    """Seconds against an attribute of cells, a panel for each work that has several of it."""
    works = [
        work
        for work in dict.fromkeys(c.work for c in cells)
        if len({getattr(c, axis) for c in cells if c.work == work}) > 1
    ]
    columns = min(4, max(1, len(works)))
    rows = -(-max(1, len(works)) // columns)
    figure, grid = _figure(3.2 * columns, 2.6 * rows, rows, columns)
    for axes, work in zip(grid.flat, works, strict=False):
        for who in COLOURS:
            line = sorted((getattr(c, axis), c.seconds[who]) for c in cells if c.work == work and who in c.seconds)
            if line:
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=TITLES[who], color=COLOURS[who])
        axes.set(xscale="log", yscale="log", xlabel={"N": "batch size"}.get(axis, axis), ylabel="s")
        measured = sorted({getattr(c, axis) for c in cells if c.work == work})
        axes.set_xticks(measured, [str(value) for value in measured])
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.set_title(work, fontsize=8)
    for axes in grid.flat[len(works) :]:
        axes.set_visible(False)
    return _saved(figure, grid.flat[0], path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """A figure and its panels [rows, columns]."""
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
