"""The embedded server as a system to be disturbed; killed with its supervisor, it is started again on its folder."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import redis
from tests.cluster.cluster import flush
from tests.cluster.processes import find, gone, wait_until

START_SECONDS = 120.0
_CURVATURE = str(Path(sys.executable).with_name("curvature"))


class Embedded:
    """`curvature serve` on a folder, while its `with` lasts."""

    def __init__(self, folder: Path, *, workers: int = 2, settings: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._output = folder / "data", folder / "serve.log"
        self.logs = self._data / "logs"
        self._workers, self._settings = workers, settings or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._lock = threading.Lock()
        self.database_url = f"sqlite:///{self._data / 'curvature.db'}"
        self.storage_url = (self._data / "objects").as_uri()
        self.disturbances: dict[str, Callable[[], bool]] = {"flush": self._flush, "supervisor": self._kill_supervisor}
        self.urls: list[str] = []

    def __enter__(self) -> "Embedded":
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
        """Stop it as Ctrl-C does."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(60)

    def roots(self) -> list[int]:
        """The supervisor."""
        process = self._process
        return [] if process is None else [process.pid]

    def _start(self) -> None:
        command = [_CURVATURE, "serve", "--port", str(self._port), "--data-dir", str(self._data), "--threads", "1"]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--workers", str(self._workers)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._settings},
            )
        wait_until(self._url, START_SECONDS, "the server to get ready")
        url = self._url()
        assert url is not None
        self.urls[:] = [url]
        self._port = int(url.rpartition(":")[2])

    def _url(self) -> str | None:
        text = self._output.read_text(errors="replace")
        found = re.search(r"ready at (\S+)", text)
        if found is None and (self._process is None or self._process.poll() is not None):
            raise RuntimeError(f"the server ended while starting:\n{text}")
        return None if found is None else found[1]

    @property
    def redis_url(self) -> str | None:
        """Where its broker answers; None while it has none."""
        for broker in find(self, "broker"):
            # Its socket is elsewhere where the data folder's path is too long for one.
            line = " ".join(broker.cmdline())
            if (socket := re.search(r"unixsocket[: ](\S+)", line)) is not None:
                return f"unix://{socket[1]}?db=0"
        return None

    def _flush(self) -> bool:
        if (url := self.redis_url) is None:
            return False
        with redis.Redis.from_url(url) as connection:
            return flush(connection)

    def _kill_supervisor(self) -> bool:
        """Everything goes with it, and comes back."""
        everything = [process for role in ("worker", "child", "api", "broker") for process in find(self, role)]
        with self._lock:
            process = self._process
            if process is None:
                return False
            process.kill()
            process.wait()
            wait_until(lambda: all(gone(p) for p in everything), 30, "everything to end with its supervisor")
            self._start()
        return True
