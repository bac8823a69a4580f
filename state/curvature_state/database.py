"""Connections and transactions, SQLite and PostgreSQL alike."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x63757276
"""Number of the PostgreSQL advisory lock under which tables are changed ("curv")."""
_CONNECT_SECONDS = 5
_RESTED_SECONDS = 1.0


def make_engine(url: str, *, pooled: bool = True) -> Engine:
    """A SQLAlchemy engine with our SQLite settings: WAL, and transactions that we begin ourselves."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite_engine(parsed)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")  # the driver that is installed, not SQLAlchemy's default
    # A URL of its own mind about the time to connect keeps it.
    timeout = {} if "connect_timeout" in parsed.query else {"connect_timeout": _CONNECT_SECONDS}
    if not pooled:
        return create_engine(parsed, poolclass=NullPool, connect_args=timeout)
    engine = create_engine(parsed, connect_args=timeout)
    _ping_rested_connections(engine)
    return engine


def _ping_rested_connections(engine: Engine) -> None:
    """See that a pooled connection lives before it is used, unless it was used a moment ago.

    SQLAlchemy's own pre-ping asks every time, which takes as long as a transaction of ours.
    """

    @event.listens_for(engine, "checkin")
    def _note(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ping(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
        rests_since = record.info.get("rests_since")
        if rests_since is None or time.monotonic() - rests_since < _RESTED_SECONDS:
            return
        try:
            alive = engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error
        if not alive:
            raise DisconnectionError


def _sqlite_engine(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin deferred transactions behind our back
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    return engine


class TablesDiffer(RuntimeError):
    """The database's tables are not those that this version works with."""

    def __init__(self, found: str | None) -> None:
        self.found = found
        if found is None:
            what, remedy = "the database has no tables yet", "make them with `curvature admin migrate`"
        elif found in _known_revisions():
            what = f"the database's tables are of version {found}, not {newest_revision()}"
            remedy = "bring them up to date with `curvature admin migrate`"
        else:
            what = f"the database's tables are of version {found}, which is newer than {newest_revision()}"
            remedy = "install the version of curvature that made them, or a later one"
        super().__init__(f"{what}; {remedy}")


class Database:
    """One database. `read()` and `write()` are transactions; a writing one takes SQLite's lock at once.

    A deferred transaction that reads and then writes fails with "database is locked" under load.
    """

    def __init__(self, url: str) -> None:
        self._engine = make_engine(url)
        # Alone, a statement that reads needs no BEGIN and no ROLLBACK around it, each of them a round trip; and several
        # of them see no more of one moment in a transaction of PostgreSQL's usual isolation.
        self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._is_sqlite = self._engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading."""
        with Session(self._engine if self._is_sqlite else self._reader, expire_on_commit=False) as session:
            if self._is_sqlite:
                session.execute(text("BEGIN"))
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end, or rolls back on an exception."""
        with Session(self._engine, expire_on_commit=False) as session:
            if self._is_sqlite:
                session.execute(text("BEGIN IMMEDIATE"))
            with _committing(session):
                yield session

    def ping(self) -> None:
        """Whether the database answers, with tables of this version.

        Raises:
            TablesDiffer: if they are of another.
            SQLAlchemyError: if it does not answer.
        """
        found = self.revision()
        if found != newest_revision():
            raise TablesDiffer(found)

    def revision(self) -> str | None:
        """The version of the database's tables; None if there are none."""
        with self.read() as session:
            if not inspect(session.connection()).has_table("alembic_version"):
                return None
            found: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
            return found

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def insert_new(session: Session, table: type[DeclarativeBase], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows; those whose key is there already change nothing."""
    if not rows:
        return
    insert = sqlite_insert if session.get_bind().dialect.name == "sqlite" else postgresql_insert
    session.execute(insert(table).on_conflict_do_nothing(), rows)


@contextmanager
def _committing(session: Session) -> Iterator[None]:
    try:
        yield
        session.commit()
    except BaseException:
        session.rollback()
        raise


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database's tables to the newest form, or to that of a revision."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))  # a `%` would interpolate
    engine = make_engine(url, pooled=False)
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                connection.execute(text("BEGIN IMMEDIATE"))
            else:  # two servers that start at once take turns
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
            connection.commit()
    finally:
        engine.dispose()


@cache
def newest_revision() -> str | None:
    """The version of the tables that this code works with."""
    return ScriptDirectory(str(_MIGRATIONS)).get_current_head()


def _known_revisions() -> set[str]:
    return {script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions()}
