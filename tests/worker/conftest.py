"""Real parts for the worker's tests: a broker, a database, a store, children.

A child takes more than a second to start, so one pool serves all tests that do not need a special one.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from tests.worker.desk import Desk

from curvature_state import migrate
from curvature_worker.pool import ChildPool
from curvature_worker.settings import WorkerSettings


@pytest.fixture(scope="session")
def redis_url(redis_server):
    return redis_server.url


@pytest.fixture
def settings(tmp_path, redis_url):
    """A worker's settings: a fresh database and store, short waits."""
    made = make_settings(tmp_path, redis_url)
    migrate(made.database_url)
    return made


def make_settings(folder, redis_url, **changes):
    return WorkerSettings(
        **{
            "database_url": f"sqlite:///{folder}/db/curvature.db",
            "storage_url": f"file://{folder}/objects",
            "redis_url": redis_url,
            "scratch_dir": folder / "scratch",
            "threads": 1,
            "lease_seconds": 5.0,
            "renew_seconds": 0.1,
            "poll_seconds": 0.05,
            **changes,
        }
    )


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="session")
def shared_pool(pool_folder, redis_url):
    """One pool for all tests that leave it fit for the next."""
    pool = ChildPool(make_settings(pool_folder, redis_url), pool_folder)
    pool.open()
    yield pool
    pool.close()


@pytest.fixture
def desk(settings, shared_pool, tmp_path):
    """Everything to run jobs in this process, with the shared pool."""
    made = Desk(settings, shared_pool, tmp_path)
    yield made
    made.close()


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def children_of_this_process():
    """Fails a test that leaves a process behind."""
    import psutil

    before = set(psutil.Process(os.getpid()).children(recursive=True))
    yield
    deadline = time.monotonic() + 5
    while left := set(psutil.Process(os.getpid()).children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@pytest.fixture
def other_file_system(tmp_path):
    """A folder on another file system than `tmp_path`."""
    for place in ("/dev/shm", tempfile.gettempdir(), str(Path.home())):
        if Path(place).is_dir() and os.access(place, os.W_OK) and Path(place).stat().st_dev != tmp_path.stat().st_dev:
            folder = Path(tempfile.mkdtemp(prefix="cw-", dir=place))
            yield folder
            shutil.rmtree(folder)
            return
    pytest.skip("there is only one file system here")
