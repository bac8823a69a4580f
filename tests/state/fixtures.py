"""Servers that tests of several folders share, each started at its first use."""

import pytest
from tests.state.servers import PostgresServer, RedisServer, S3Server

from curvature_state import migrate


@pytest.fixture(scope="session")
def postgres():
    yield from _running(PostgresServer())


@pytest.fixture(scope="session")
def redis_server():
    yield from _running(RedisServer())


@pytest.fixture(scope="session")
def s3_process():
    yield from _running(S3Server())


@pytest.fixture
def s3_server(s3_process, monkeypatch):
    """An S3 server with one empty bucket, and the environment that leads to it."""
    s3_process.empty()
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    return s3_process


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    """A SQLite file with our tables, as bytes, so that no test can write into what the others begin with."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path.read_bytes()


def _running(server):
    try:
        server.start()
        yield server
    finally:
        server.close()
