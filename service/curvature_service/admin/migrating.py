"""`curvature admin migrate`."""

import typer
from alembic.util import CommandError

from curvature_service.admin.records import errors_told, open_database, read_settings
from curvature_state import migrate as migrate_tables
from curvature_state.database import TablesDiffer, newest_revision


def migrate() -> None:
    """Make the database's tables, or bring them up to date. Nothing that is in them is lost."""
    with errors_told():
        url = read_settings().database_url
        database = open_database(url)
        try:
            before = database.revision()
            if before == newest_revision():
                typer.echo(f"the tables are up to date (version {before})")
                return
            try:
                migrate_tables(url)
            except CommandError as error:  # a version that this one has not heard of
                raise TablesDiffer(before) from error
            after = database.revision()
            typer.echo(f"made the tables (version {after})" if before is None else f"version {before} → {after}")
        finally:
            database.close()
