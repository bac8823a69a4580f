"""`curvature worker`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from curvature_worker.app import main
from curvature_worker.settings import WorkerSettings


def worker(
    name: Annotated[str | None, typer.Option(help="what operators call it; the machine's name by default")] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", help="what jobs may require of their worker; repeat for several")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda, or cuda:N; one worker per GPU")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the computation")] = None,
    memory_limit_gib: Annotated[
        float | None,
        typer.Option(help="limit of the model process's address space; 80 % of memory on a CPU by default"),
    ] = None,
    scratch_dir: Annotated[Path | None, typer.Option(help="where to keep files while working")] = None,
    require_isolation: Annotated[bool, typer.Option(help="refuse to start without Landlock and seccomp")] = False,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO (default), WARNING, ERROR")] = None,
) -> None:
    """Run a worker: it takes jobs from the queue of CURVATURE_REDIS_URL until stopped."""
    given: dict[str, Any] = {
        "worker_name": name,
        "tags": tags or None,
        "device": device,
        "threads": threads,
        "memory_limit_bytes": None if memory_limit_gib is None else int(memory_limit_gib * 2**30),
        "scratch_dir": scratch_dir,
        "require_isolation": require_isolation or None,
        "log_level": log_level,
    }
    try:
        settings = WorkerSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        typer.echo(f"curvature worker: the settings do not fit: {reasons}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(main(settings))
