"""`curvature admin gc`."""

from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer
from obstore.exceptions import BaseError as StoreError

from curvature_service.admin.records import AdminError, opened, read_settings
from curvature_service.admin.tables import show_table
from curvature_service.retention.service import policy_of
from curvature_service.settings import ServiceSettings
from curvature_state import Database, ObjectStore
from curvature_state.retention import Report, collect
from curvature_state.tidying import tidy


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what would be removed, and remove nothing")] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="remove what the store has and no record names, too, if a day old")
    ] = False,
) -> None:
    """Remove what the limits do not keep (CURVATURE_KEEP_…_DAYS, CURVATURE_MAX_STORED_BYTES), and what was left over.

    Never what is pinned, or what a job needs that is not over. The API does the same by itself, but for --orphans.
    """
    with opened() as database:
        report = _collect(database, dry_run=dry_run, orphans=orphans)
        if not report.lines:
            typer.echo("there is nothing to remove", err=True)
            return
        show_table(
            ["KIND", "COUNT", "BYTES", "WHY"],
            [[line.kind, str(line.count), f"{line.size_bytes:,}", line.why] for line in report.lines],
        )
        done = "would be removed" if dry_run else "removed"
        typer.echo(f"{report.size_bytes:,} bytes {done}")


def _collect(database: Database, *, dry_run: bool, orphans: bool) -> Report:
    settings = read_settings()
    objects = _open_store(settings)
    try:
        report = tidy(database, objects, orphans=orphans, dry_run=dry_run)
        return report + collect(database, objects, policy_of(settings), dry_run=dry_run)
    except StoreError as error:
        raise _store_away(error) from error


def _open_store(settings: ServiceSettings) -> ObjectStore:
    """The store, which must be told and there: with another one, records would go and bytes stay."""
    if "storage_url" not in settings.model_fields_set:
        raise AdminError("set CURVATURE_STORAGE_URL to the store of this database, as the API has it")
    folder = urlsplit(settings.storage_url)
    if folder.scheme == "file" and not Path(unquote(folder.path)).is_dir():
        raise AdminError(f"there is no store {settings.storage_url}; set CURVATURE_STORAGE_URL as the API has it")
    try:
        objects = ObjectStore(settings.storage_url)
        objects.ping()
    except (StoreError, RuntimeError, ValueError) as error:
        raise _store_away(error) from error
    return objects


def _store_away(error: Exception) -> AdminError:
    reason = str(error).splitlines()[0]
    return AdminError(f"the object store does not answer: {reason}; see CURVATURE_STORAGE_URL")
