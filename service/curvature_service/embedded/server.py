"""The supervisor."""

import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from alembic.util import CommandError
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from curvature_service.embedded.broker import broker_command, find_broker
from curvature_service.embedded.errors import ServeError
from curvature_service.embedded.processes import Supervised
from curvature_state import Database, migrate
from curvature_state.workers import forget_workers

logger = logging.getLogger("curvature.serve")

_LONGEST_SOCKET_PATH = 100
_WATCH_SECONDS = 0.2
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Options:
    """What `curvature serve` was asked for."""

    host: str
    port: int
    data_dir: Path
    device: str = "cpu"
    workers: int = 1
    threads: int | None = None

    @property
    def threads_each(self) -> int | None:
        """Threads of each worker's computation: several workers share the cores, or all of them crawl."""
        if self.threads is None and self.workers > 1:
            return max(1, (os.cpu_count() or 1) // self.workers)
        return self.threads


class EmbeddedServer:
    """Starts broker, API and workers on one data folder, watches them, and stops them.

    Attributes:
        url: where the API answers, once started.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._stopping = threading.Event()
        self._processes: list[Supervised] = []
        self.url = ""

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM.

        Raises:
            ServeError: if it cannot start.
        """
        binary = find_broker()
        data = self._options.data_dir
        lock = _claim_folder(data)
        try:
            listener = _listen(self._options.host, self._options.port)
            self.url = _url(listener)
            previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                self._start(binary, data, listener)
                self._watch()
            finally:
                self._stop_all()
                for number, handler in previous.items():
                    signal.signal(number, handler)
                listener.close()
        finally:
            lock.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(_WATCH_SECONDS):
            for process in self._processes:
                process.look_after()

    def _stop_all(self) -> None:
        self._say("stopping …")
        for process in reversed(self._processes):
            process.stop()

    def _start(self, binary: Path, data: Path, listener: socket.socket) -> None:
        broker_socket = _socket_path(data)
        environment = _environment(data, broker_socket)
        _prepare_records(environment["CURVATURE_DATABASE_URL"])
        logs = data / "logs"
        broker = Supervised("broker", broker_command(binary, broker_socket, data), logs / "broker.log")
        api = Supervised(
            "api",
            [sys.executable, "-m", "curvature_service", "--fd", str(listener.fileno())],
            logs / "api.log",
            environment=environment,
            fds=[listener.fileno()],
        )
        workers = [
            Supervised(f"worker-{n}", self._worker_command(), logs / f"worker-{n}.log", environment=environment)
            for n in range(self._options.workers)
        ]
        for process in (broker, api, *workers):
            self._processes.append(process)
            process.start()
        self._await_ready()

    def _worker_command(self) -> list[str]:
        command = [sys.executable, "-m", "curvature_worker", "--device", self._options.device]
        if (threads := self._options.threads_each) is not None:
            command += ["--threads", str(threads)]
        return command

    def _await_ready(self) -> None:
        """Wait for the API to say that all parts answer; a part that cannot start is told as it is."""
        for _ in range(int(_START_SECONDS / _WATCH_SECONDS)):
            if self._stopping.wait(_WATCH_SECONDS):
                return
            for process in self._processes:
                if process.failed_at_once:
                    raise ServeError(f"the {process.name} did not start: {process.last_words()}")
            if _get(f"{self.url}/v1/ready") is not None and self._workers_seen() >= self._options.workers:
                break
        else:
            raise ServeError(f"the server did not get ready; see {self._options.data_dir / 'logs'}")
        self._greet()

    def _workers_seen(self) -> int:
        health = _get(f"{self.url}/v1/health") or {"workers": []}
        return len(health["workers"])

    def _greet(self) -> None:
        options = self._options
        health = _get(f"{self.url}/v1/health") or {"workers": []}
        isolation = ", ".join(sorted({str(w["isolation"]) for w in health["workers"]})) or "unknown"
        self._say(f"  data       {options.data_dir}")
        self._say(f"  logs       {options.data_dir / 'logs'}")
        self._say(f"  device     {options.device} ({options.workers} worker{'s' if options.workers > 1 else ''})")
        self._say(f"  isolation  {isolation}")
        self._say(f"  API docs   {self.url}/docs")
        self._say(f"Curvature is ready at {self.url} (Ctrl-C stops it)")


def _environment(data: Path, broker_socket: Path) -> dict[str, str]:
    """The settings of all parts."""
    database = URL.create("sqlite", database=str(data / "curvature.db"))
    return {
        "CURVATURE_DATABASE_URL": database.render_as_string(),
        "CURVATURE_STORAGE_URL": (data / "objects").as_uri(),
        "CURVATURE_REDIS_URL": f"unix://{quote(str(broker_socket))}?db=0",
        "CURVATURE_SCRATCH_DIR": str(data / "scratch"),
    }


def _prepare_records(url: str) -> None:
    """Tables of this version, and no workers in them: the folder is ours, so those of an earlier run are gone."""
    try:
        migrate(url)
        database = Database(url)
        forget_workers(database)
        database.close()
    except (SQLAlchemyError, CommandError) as error:
        raise ServeError(f"the records in {url.removeprefix('sqlite:///')} cannot be used: {error}") from error


def _claim_folder(data: Path) -> "_Lock":
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)  # models and batches are nobody else's business
        for folder in (data / "logs", data / "objects"):
            folder.mkdir(exist_ok=True)
        return _Lock(data / "lock")
    except OSError as error:
        raise ServeError(
            f"the data folder {data} cannot be used ({error.strerror}: {error.filename}); "
            "choose another with --data-dir"
        ) from error


class _Lock:
    """One server per data folder; the lock goes with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise ServeError(
                f"another server uses the data folder {path.parent}; stop it, or choose another with --data-dir"
            ) from error

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._descriptor)


def _listen(host: str, port: int) -> socket.socket:
    """The API's socket, ours: restarts of the API keep it, and requests wait in it meanwhile."""
    listener = None
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by its connections: else each reply's body waits some 40 ms for its head to be acknowledged.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ServeError(
            f"cannot listen on {host}, port {port} ({error.strerror}); "
            "choose another port with --port (0 takes a free one)"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    """Where this machine reaches the socket; an address that stands for all is reached by loopback."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _socket_path(data: Path) -> Path:
    """The broker's socket: in the data folder, or in a private folder of its own where that path is too long."""
    path = data / "broker.sock"
    if len(str(path).encode()) <= _LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(str(data).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"curvature-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat(follow_symlinks=False).st_uid != os.getuid():
        raise ServeError(f"{folder} belongs to another user; choose a shorter path with --data-dir")
    return folder / "broker.sock"


def _get(url: str) -> dict[str, list[dict[str, object]]] | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
    try:
        with opener.open(url, timeout=5) as reply:
            found: dict[str, list[dict[str, object]]] = json.load(reply)
            return found
    except (urllib.error.URLError, OSError, ValueError):
        return None
