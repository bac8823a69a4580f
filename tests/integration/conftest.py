"""One embedded server for all tests that do it no harm, and a client of it."""

import pytest
import torch
from tests.integration.serving import Server

from curvature_client import Client


def pytest_collection_modifyitems(items):
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("serve") / "data")
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server):
    with Client(server.url) as client:
        yield client


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may hurt."""
    running = Server(tmp_path / "data")
    yield running
    running.stop()


@pytest.fixture
def one_thread():
    """The server computes with one thread; equal bits need the same here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
