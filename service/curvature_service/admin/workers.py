"""`curvature admin workers` and `curvature admin drain`."""

from typing import Annotated

import typer
from rich.text import Text

from curvature_protocol.health import WorkerView
from curvature_service.admin.records import AdminError, opened
from curvature_service.admin.tables import ago, show_table, size
from curvature_state.workers import HEARD_SECONDS, list_workers, set_draining


def workers() -> None:
    """List the workers that run: what they are, and what they do."""
    with opened() as database:
        found = list_workers(database)
        if not found:
            typer.echo("no worker runs; `curvature worker` starts one", err=True)
            return
        show_table(
            ["NAME", "ID", "DEVICE", "MEMORY", "TAGS", "STATE", "SEEN"],
            [
                [
                    worker.name or "-",
                    worker.id,
                    worker.device,
                    size(worker.memory_bytes) if worker.memory_bytes else "-",
                    ", ".join(worker.tags) or "-",
                    _state(worker),
                    ago(worker.seen_at),
                ]
                for worker in found
            ],
        )


def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a worker's name (all of that name) or id")],
    undo: Annotated[bool, typer.Option("--undo", help="let it take jobs again")] = False,
) -> None:
    """Have a worker finish the job at hand and take no other, so that it can be stopped without loss of work.

    It goes on running, and waits. It forgets about draining when it is stopped.
    """
    with opened() as database:
        changed = set_draining(database, name, not undo)
        found = {worker.id: worker for worker in list_workers(database)}
        if not changed:
            known = sorted({worker.name or worker.id for worker in found.values()})
            among = f"those that run: {', '.join(known)}" if known else "none runs"
            raise AdminError(f"no worker that runs has the name or id {name!r}; {among}")
        for worker_id in changed:
            job = found[worker_id].job if worker_id in found else None
            typer.echo(f"{_title(worker_id, found)}: {_told(undo, job)}")


def _told(undo: bool, job: str | None) -> str:
    if undo:
        return "takes jobs again"
    if job is None:
        return f"idle; hears of it within {HEARD_SECONDS:.0f} s, and takes no more jobs then"
    return f"finishes job {job}, then takes no other"


def _title(worker_id: str, found: dict[str, WorkerView]) -> str:
    name = found[worker_id].name if worker_id in found else ""
    return f"{name} ({worker_id})" if name else worker_id


def _state(worker: WorkerView) -> Text:
    if worker.draining:
        return Text("drained" if worker.job is None else f"draining ({worker.job})", "yellow")
    return Text("idle", "dim") if worker.job is None else Text(f"busy ({worker.job})", "green")
