"""Tables and times as a terminal shows them; in a pipe the same without colours."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDEST = 1000
"""Wider than any row: a terminal may wrap a line, but nothing is cut off."""


def show_table(head: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Columns as wide as their contents."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in head:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    console = Console(width=_WIDEST, highlight=False)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def ago(moment: datetime | None) -> str:
    """How long ago, in words."""
    if moment is None:
        return "never"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return f"{seconds} s ago"


def day(moment: datetime) -> str:
    """Date and time on this machine's clock."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def size(count: int) -> str:
    """Bytes in words."""
    if count >= 2**30:
        return f"{count / 2**30:.3g} GiB"
    return f"{count / 2**20:.3g} MiB"
