"""`curvature sweep` and `curvature sweeps`."""

import csv
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from curvature_client._client import Client
from curvature_client._errors import CurvatureError
from curvature_client._frames import COLUMNS, column_of, record_of
from curvature_client._results import checked_target
from curvature_client._sweep_files import read_sweep_file
from curvature_client._sweeps import Sweep, SweepRow
from curvature_client._tables import table

Url = Annotated[str | None, typer.Option("--url", help="the server's address; else CURVATURE_URL")]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="folder for each row's tensors, {row}.safetensors, and the table rows.csv"),
]
Timeout = Annotated[float | None, typer.Option(help="seconds to wait; as long as it takes if left out")]

_MOST_REASONS = 20

sweeps_app = typer.Typer(invoke_without_command=True, help="List sweeps; show, wait for, cancel, retry or delete one.")


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file with grid or rows (docs/sweeps.md)")],
    output: Folder = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait until every job is over")] = True,
    timeout: Timeout = None,
    url: Url = None,
) -> None:
    """Submit the many jobs that FILE describes: models, batches, losses and seeds, as a grid or row by row."""
    if output is not None:
        _make_folder(output)
    arguments = read_sweep_file(file)
    with Client(url) as client:
        found = client.sweep(**arguments)
        typer.echo(f"sweep {found.id}: {len(found)} rows")
        if wait:
            _follow(found, output, timeout)


@sweeps_app.callback()
def list_sweeps(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
    url: Url = None,
) -> None:
    """List sweeps, newest first."""
    if context.invoked_subcommand is not None:
        return
    with Client(url) as client:
        found = client.sweeps.list(limit=limit)
    rows = [
        [
            each.id,
            f"{each.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
            str(len(each)),
            ", ".join(each.axes),
            _states(each),
        ]
        for each in found
    ]
    _echo([["SWEEP", "CREATED", "ROWS", "AXES", "STATES"], *rows])


@sweeps_app.command("show")
def show_sweep(sweep_id: str, url: Url = None) -> None:
    """Show where one sweep stands, and why rows failed."""
    with Client(url) as client:
        _report(client.sweeps.get(sweep_id))


@sweeps_app.command("wait")
def wait_for_sweep(sweep_id: str, output: Folder = None, timeout: Timeout = None, url: Url = None) -> None:
    """Wait until every job of one sweep is over."""
    if output is not None:
        _make_folder(output)
    with Client(url) as client:
        _follow(client.sweeps.get(sweep_id), output, timeout)


@sweeps_app.command("cancel")
def cancel_sweep(sweep_id: str, url: Url = None) -> None:
    """Cancel all jobs of one sweep that are not over."""
    with Client(url) as client:
        typer.echo(_states(client.sweeps.get(sweep_id).cancel()))


@sweeps_app.command("retry")
def retry_sweep(sweep_id: str, url: Url = None) -> None:
    """Queue the failed and cancelled jobs of one sweep once more."""
    with Client(url) as client:
        typer.echo(_states(client.sweeps.get(sweep_id).retry_failed()))


@sweeps_app.command("delete")
def delete_sweep(sweep_id: str, url: Url = None) -> None:
    """Delete one sweep, all of whose jobs must be over, with its jobs and their results."""
    with Client(url) as client:
        client.sweeps.get(sweep_id).delete()
    typer.echo(f"deleted {sweep_id}")


def _follow(found: Sweep, output: Path | None, timeout: float | None) -> None:
    """Wait for the end, saving what comes; a sweep that is not all success is told by the exit status."""
    try:
        if output is None:
            found.wait(timeout)
        else:
            for row in found.completed(timeout):
                if row.status == "succeeded":
                    row.result().save(_target(output, row))
            _write_table(found.refresh(), output)
    except KeyboardInterrupt:
        typer.echo(f"\ncurvature: sweep {found.id} goes on; see `curvature sweeps wait {found.id}`", err=True)
        raise
    _report(found)
    if set(found.counts) != {"succeeded"}:
        raise typer.Exit(1)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CurvatureError(
            f"the folder {folder} cannot be made ({error.strerror})", code="invalid_request", remedy="choose another"
        ) from None
    checked_target(folder / "rows.csv")


def _target(folder: Path, row: SweepRow) -> Path:
    return folder / f"{row.number:05d}.safetensors"


def _write_table(found: Sweep, folder: Path) -> None:
    """The rows as a table: what can be read without this package."""
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["row", *map(column_of, found.axes), *COLUMNS])
        writer.writeheader()
        for view in found.views():
            writer.writerow({"row": view.row, **record_of(found.axes, view)})


def _report(found: Sweep) -> None:
    """Counts, and why rows failed."""
    _echo([["STATE", "JOBS"], *([state, str(count)] for state, count in found.counts.items())])
    failed = found.rows_in("failed") if found.counts.get("failed") else []
    if not failed:
        return
    typer.echo("")
    shown = [
        [str(row.number), *(_cell(row.coordinates.get(axis)) for axis in found.axes), str(row.error)] for row in failed
    ]
    _echo([["ROW", *(axis.upper() for axis in found.axes), "WHY IT FAILED"], *shown[:_MOST_REASONS]])
    if len(failed) > _MOST_REASONS:
        codes = Counter(row.error.code for row in failed if row.error is not None)
        told = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        typer.echo(f"… and {len(failed) - _MOST_REASONS} more; in all {told}")


def _states(found: Sweep) -> str:
    return ", ".join(f"{count} {state}" for state, count in found.counts.items()) or "-"


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _echo(rows: list[list[str]]) -> None:
    for line in table(rows):
        typer.echo(line)
