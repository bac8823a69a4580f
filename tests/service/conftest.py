"""The API on a real port, with a real database, object store and Redis-protocol server."""

import pytest
from tests.service.server import LiveServer, settings_in


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
