"""A cluster on this machine: PostgreSQL, Redis, S3 or a folder, API processes and workers, each a real process."""

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

import httpx
import redis
from tests.cluster.processes import wait_until
from tests.state.servers import PostgresServer, S3Server

from curvature_service.embedded.broker import broker_command, find_broker
from curvature_service.embedded.processes import Supervised
from curvature_state import migrate

START_SECONDS = 120.0
_WATCH_SECONDS = 0.1
_PAUSE_SECONDS = 0.5


class Cluster:
    """Runs while its `with` lasts. Whatever dies is started again after a short pause, as an orchestrator would do.

    Args:
        folder: for logs, the workers' scratch folders, and the store where it is a folder.
        workers: how many.
        apis: how many API processes.
        s3: store objects on an S3 server; else in a folder.
        settings: `CURVATURE_<NAME>` of all processes.
    """

    def __init__(
        self, folder: Path, *, workers: int = 3, apis: int = 2, s3: bool = True, settings: dict[str, str] | None = None
    ) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self._folder, self._workers, self._apis, self._s3 = folder, workers, apis, s3
        self._given = settings or {}
        self._stack = ExitStack()
        self._processes: dict[str, Supervised] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="supervisor")
        self.disturbances: dict[str, Callable[[], bool]] = {}
        self.urls: list[str] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in reversed(self._processes.values()):
            process.stop()
        self._processes.clear()
        self._stack.close()

    def roots(self) -> list[int]:
        """The guardians of its processes, and PostgreSQL's first."""
        with self._lock:
            guardians = [pid for process in self._processes.values() if (pid := process.guardian) is not None]
        return [*guardians, self._postgres.pid]

    def add_worker(self) -> None:
        """Start one more worker and wait for it."""
        self._start_worker(sum(name.startswith("worker") for name in self._processes))
        self._await_workers()

    def workers(self) -> int:
        """How many workers the API knows."""
        try:
            found = httpx.get(f"{self.urls[0]}/v1/health", trust_env=False, timeout=5).json()["workers"]
        except (httpx.HTTPError, ValueError):
            return 0
        return len(found)

    def _start(self) -> None:
        self._postgres = postgres = PostgresServer()
        self._stack.callback(postgres.close)
        postgres.start()
        self.database_url = postgres.url(postgres.create_database())
        self.disturbances["database"] = lambda: postgres.restart() is None
        migrate(self.database_url)
        self._open_store()
        self._start_broker()
        self.environment = {
            "CURVATURE_DATABASE_URL": self.database_url,
            "CURVATURE_STORAGE_URL": self.storage_url,
            "CURVATURE_REDIS_URL": self.redis_url,
            "CURVATURE_SCRATCH_DIR": str(self._folder / "scratch"),
            "OMP_NUM_THREADS": "1",
            **self._given,
        }
        for number in range(self._apis):
            port = _free_port()
            self.urls.append(f"http://127.0.0.1:{port}")
            self._supervise(f"api-{number}", ["-m", "curvature_service", "--host", "127.0.0.1", "--port", str(port)])
        for number in range(self._workers):
            self._start_worker(number)
        self._watcher.start()
        for url in self.urls:
            wait_until(lambda url=url: _answers(f"{url}/v1/ready"), START_SECONDS, f"{url} to get ready")
        self._await_workers()

    def _open_store(self) -> None:
        if not self._s3:
            self.storage_url = (self._folder / "objects").as_uri()
            return
        server = S3Server()
        self._stack.callback(server.close)
        server.start()
        # Of this process, too: it looks into the store afterwards.
        self._stack.enter_context(patch.dict(os.environ, server.environment))
        self.storage_url = server.url("cluster")

    def _start_broker(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="redis-")))  # a short name
        self.redis_url = f"unix://{folder / 'broker.sock'}?db=0"
        command = broker_command(find_broker(), folder / "broker.sock", folder)
        self._add(
            "broker", Supervised("broker", command, self.logs / "broker.log", longest_pause_seconds=_PAUSE_SECONDS)
        )
        connection = self._stack.enter_context(redis.Redis.from_url(self.redis_url))
        self.disturbances["flush"] = lambda: flush(connection)
        wait_until(lambda: _pings(connection), START_SECONDS, "the broker")

    def _start_worker(self, number: int) -> None:
        self._supervise(f"worker-{number}", ["-m", "curvature_worker", "--threads", "1"])

    def _await_workers(self) -> None:
        expected = sum(name.startswith("worker") for name in self._processes)
        wait_until(lambda: self.workers() >= expected, START_SECONDS, f"{expected} workers")

    def _supervise(self, name: str, arguments: list[str]) -> None:
        process = Supervised(
            name,
            [sys.executable, *arguments],
            self.logs / f"{name}.log",
            environment=self.environment,
            longest_pause_seconds=_PAUSE_SECONDS,
        )
        self._add(name, process)

    def _add(self, name: str, process: Supervised) -> None:
        process.start()
        with self._lock:
            self._processes[name] = process

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_SECONDS):
            with self._lock:
                for process in self._processes.values():
                    process.look_after()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def flush(connection: redis.Redis) -> bool:
    """Empty the broker; False if it does not answer."""
    try:
        return bool(connection.flushall())
    except redis.RedisError:
        return False


def _pings(connection: redis.Redis) -> bool:
    try:
        return bool(connection.ping())
    except redis.RedisError:
        return False
