"""Databases (SQLite and PostgreSQL), a Redis-protocol server, object stores."""

import pytest
from sqlalchemy import text

from curvature_state import Database, ObjectStore, migrate
from curvature_state.database import make_engine, newest_revision
from curvature_state.tables import Base


@pytest.fixture(scope="session")
def postgres_database(postgres):
    """One database for all tests: PostgreSQL takes 8 MB for each."""
    url = postgres.url(postgres.create_database())
    migrate(url)
    engine = make_engine(url)
    yield url, engine
    engine.dispose()


@pytest.fixture
def postgres_url(postgres_database):
    """A PostgreSQL database with our tables, empty."""
    url, engine = postgres_database
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE " + ", ".join(Base.metadata.tables)))
        connection.execute(text("UPDATE alembic_version SET version_num = :newest"), {"newest": newest_revision()})
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def database_url(request, tmp_path):
    """A database with our tables, once SQLite, once PostgreSQL."""
    if request.param == "sqlite":
        path = tmp_path / "curvature.db"
        path.write_bytes(request.getfixturevalue("sqlite_template"))
        return f"sqlite:///{path}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def database(database_url):
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def redis_connection(redis_server):
    connection = redis_server.connect()
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def objects(tmp_path):
    return ObjectStore(f"file://{tmp_path}/objects")
