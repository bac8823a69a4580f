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

from curvature_service.embedded.broker import broker_command, find_broker
from curvature_service.embedded.errors import ServeError
from curvature_service.embedded.processes import Supervised
from curvature_state import migrate

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
        data = self._options.data_dir
        (data / "logs").mkdir(parents=True, exist_ok=True)
        lock = _lock(data)
        listener = _listen(self._options.host, self._options.port)
        self.url = f"http://{self._options.host}:{listener.getsockname()[1]}"
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start(data, listener)
            while not self._stopping.wait(_WATCH_SECONDS):
                for process in self._processes:
                    process.look_after()
        finally:
            self._say("stopping …")
            for process in reversed(self._processes):
                process.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
            listener.close()
            lock.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()

    def _start(self, data: Path, listener: socket.socket) -> None:
        broker_socket = _socket_path(data)
        environment = {
            "CURVATURE_DATABASE_URL": f"sqlite:///{data / 'curvature.db'}",
            "CURVATURE_STORAGE_URL": (data / "objects").as_uri(),
            "CURVATURE_REDIS_URL": f"unix://{broker_socket}?db=0",
            "CURVATURE_SCRATCH_DIR": str(data / "scratch"),
        }
        (data / "objects").mkdir(exist_ok=True)
        migrate(environment["CURVATURE_DATABASE_URL"])
        logs = data / "logs"
        broker = Supervised("broker", broker_command(find_broker(), broker_socket, data), logs / "broker.log")
        api = Supervised(
            "api",
            [sys.executable, "-m", "curvature_service", "--fd", str(listener.fileno())],
            logs / "api.log",
            environment=environment,
            fds=[listener.fileno()],
        )
        worker_command = [sys.executable, "-m", "curvature_worker", "--device", self._options.device]
        if self._options.threads is not None:
            worker_command += ["--threads", str(self._options.threads)]
        workers = [
            Supervised(f"worker-{n}", worker_command, logs / f"worker-{n}.log", environment=environment)
            for n in range(self._options.workers)
        ]
        for process in (broker, api, *workers):
            self._processes.append(process)
            process.start()
        self._await_ready(workers)

    def _await_ready(self, workers: list[Supervised]) -> None:
        """Wait for the API to say that all parts answer; a worker that cannot start is told as it is."""
        for _ in range(int(_START_SECONDS / _WATCH_SECONDS)):
            if self._stopping.wait(_WATCH_SECONDS):
                return
            for worker in workers:
                if worker.failed_at_once:
                    raise ServeError(f"the worker did not start: {worker.last_words()}")
            if _get(f"{self.url}/v1/ready") is not None:
                break
        else:
            raise ServeError(f"the server did not get ready; see {self._options.data_dir / 'logs'}")
        health = _get(f"{self.url}/v1/health") or {"workers": []}
        isolation = ", ".join(sorted({str(w["isolation"]) for w in health["workers"]})) or "unknown"
        self._say(f"  data       {self._options.data_dir}")
        self._say(f"  logs       {self._options.data_dir / 'logs'}")
        self._say(f"  device     {self._options.device} ({self._options.workers} worker(s))")
        self._say(f"  isolation  {isolation}")
        self._say(f"  API docs   {self.url}/docs")
        self._say(f"Curvature is ready at {self.url} (Ctrl-C stops it)")


def _lock(data: Path) -> "_Lock":
    return _Lock(data / "lock")


class _Lock:
    """One server per data folder; the lock goes with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise ServeError(
                f"another server uses the data folder {path.parent}; stop it, or choose another with --data-dir"
            ) from error

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._descriptor)


def _listen(host: str, port: int) -> socket.socket:
    """The API's socket, ours: restarts of the API keep it, and requests wait in it meanwhile."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another port with --port (0 takes a free one)"
        ) from error
    listener.listen(128)
    return listener


def _socket_path(data: Path) -> Path:
    """The broker's socket: in the data folder, or in a private folder of its own where that path is too long."""
    path = data / "broker.sock"
    if len(str(path).encode()) <= _LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(str(data).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"curvature-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / "broker.sock"


def _get(url: str) -> dict[str, list[dict[str, object]]] | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            found: dict[str, list[dict[str, object]]] = json.load(reply)
            return found
    except (urllib.error.URLError, OSError, ValueError):
        return None
