"""The database as commands open it: what is wrong with it is one line on stderr, and exit status 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from pydantic import ValidationError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from curvature_service.settings import ServiceSettings
from curvature_state import Database
from curvature_state.database import TablesDiffer


class AdminError(Exception):
    """What a command cannot do, and what to do about it."""


@contextmanager
def errors_told() -> Iterator[None]:
    """Tell an error in a line instead of a traceback, and exit with 1."""
    try:
        yield
    except (AdminError, TablesDiffer, ValueError) as error:
        reason = str(error)
    except SQLAlchemyError as error:
        reason = f"the database does not answer: {_first_line(error)}; see CURVATURE_DATABASE_URL"
    except OSError as error:
        reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    else:
        return
    typer.echo(f"curvature admin: {reason}", err=True)
    raise typer.Exit(1)


@contextmanager
def opened() -> Iterator[Database]:
    """The database, with tables of this version; errors are told."""
    with errors_told():
        url = read_settings().database_url
        _check_file(url)
        database = open_database(url)
        try:
            database.ping()
            yield database
        finally:
            database.close()


def open_database(url: str) -> Database:
    """The database of a URL.

    Raises:
        AdminError: if there can be none.
    """
    try:
        return Database(url)
    except (ArgumentError, ImportError, ValueError) as error:
        raise AdminError(
            f"CURVATURE_DATABASE_URL is no address of a database: {_first_line(error)}; it is like "
            "sqlite:////folder/curvature.db or postgresql://user:password@host/name"
        ) from error


def read_settings() -> ServiceSettings:
    """The settings of the environment.

    Raises:
        AdminError: if they do not fit.
    """
    try:
        return ServiceSettings()
    except ValidationError as error:
        reasons = "; ".join(f"CURVATURE_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise AdminError(f"the settings do not fit: {reasons}") from error


def _check_file(url: str) -> None:
    """Whether SQLite's file is there: looking at what is not must not make it."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return  # told when it is opened
    if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).is_file():
        raise AdminError(
            f"there is no database {Path(parsed.database).absolute()}; set CURVATURE_DATABASE_URL (`curvature serve` "
            "has its own, curvature.db in its data folder), or make a new one with `curvature admin migrate`"
        )


def _first_line(error: Exception) -> str:
    """What a library says, without statements and links to manuals."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
