"""`curvature serve`."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from curvature_service.embedded import EmbeddedServer, Options, ServeError


def default_data_dir() -> Path:
    """Where data go if nobody says otherwise: `$XDG_DATA_HOME/curvature`, else `~/.local/share/curvature`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "curvature"


def serve(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8000,
    data_dir: Annotated[Path | None, typer.Option(help="folder for records, uploads and results")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or cuda:N", envvar="CURVATURE_DEVICE", show_envvar=False)
    ] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="worker processes")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of each computation", envvar="CURVATURE_THREADS", show_envvar=False),
    ] = None,
) -> None:
    """Run the whole service on this machine: API, worker and broker, until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    folder = (data_dir or default_data_dir()).expanduser().resolve()

    def say(line: str) -> None:
        typer.echo(line)
        sys.stdout.flush()

    try:
        EmbeddedServer(Options(host, port, folder, device, workers, threads), say).run()
    except ServeError as error:
        typer.echo(f"curvature serve: {error}", err=True)
        raise typer.Exit(1) from None
