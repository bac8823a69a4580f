"""The API on a real port, with a real database, object store and Redis-protocol server."""

import pytest
from tests.service.server import LiveServer, settings_in
from tests.state.servers import PostgresServer, RedisServer, S3Server

from curvature_state import migrate


@pytest.fixture(scope="session")
def redis_server():
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres():
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


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
def make_settings(tmp_path, redis_server, sqlite_template):
    """Settings of a fresh server: an empty database, store and Redis; keyword arguments change them."""
    with redis_server.connect() as connection:
        connection.flushall()
    return lambda **changes: settings_in(tmp_path, redis_server, sqlite_template, **changes)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, redis_server, sqlite_template):
    """One server for all tests that need no settings of their own."""
    with LiveServer(settings_in(tmp_path_factory.mktemp("shared"), redis_server, sqlite_template)) as server:
        yield server


@pytest.fixture
def serve(make_settings):
    """Starts servers with changed settings."""
    running = []

    def start(**changes):
        server = LiveServer(make_settings(**changes))
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def server(shared_server):
    """A server that holds nothing."""
    shared_server.reset()
    return shared_server


@pytest.fixture
def client(server):
    return server.client
