"""Readable tables: the same on a terminal and in a pipe."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their contents."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def dimensions(shape: Sequence[int]) -> str:
    """A shape in words, e.g. `10×1000`."""
    return "×".join(map(str, shape)) or "scalar"


def size(count: float) -> str:
    """Bytes in words, e.g. `12.8 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
