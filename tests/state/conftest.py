"""Databases (SQLite and PostgreSQL), a Redis-protocol server, object stores."""

import shutil

import pytest
from sqlalchemy import text
from tests.state.servers import PostgresServer, RedisServer, S3Server

from curvature_state import Database, ObjectStore, migrate
from curvature_state.database import make_engine, newest_revision
from curvature_state.tables import Base


@pytest.fixture(scope="session")
def postgres():
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


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


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def database_url(request, tmp_path):
    """A database with our tables, once SQLite, once PostgreSQL."""
    if request.param == "sqlite":
        path = tmp_path / "curvature.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def database(database_url):
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def redis_server():
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def redis_connection(redis_server):
    connection = redis_server.connect()
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture(scope="session")
def s3_process():
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_server(s3_process, monkeypatch):
    """An S3 server with one empty bucket, and the environment that leads to it."""
    s3_process.empty()
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    return s3_process


@pytest.fixture
def objects(tmp_path):
    return ObjectStore(f"file://{tmp_path}/objects")
