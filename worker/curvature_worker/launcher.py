"""Starting confined processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvature_worker.channel import Channel

_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


class Confined:
    """A confined process and its folders: `inbox` it may read, `outbox` it may write.

    Attributes:
        channel: to talk to it.
        pid: its process id.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel, lifeline: int, folder: Path) -> None:
        self._process = process
        self.channel = channel
        self._lifeline = lifeline
        self._folder = folder
        self.inbox, self.outbox = folder / "in", folder / "out"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once and remove its folders."""
        if self.alive:
            self._process.kill()
        self._process.wait()
        self.channel.close()
        os.close(self._lifeline)
        shutil.rmtree(self._folder, ignore_errors=True)

    def obituary(self, wait_seconds: float = 5.0) -> str:
        """How it died, in words for a user."""
        try:
            code = self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code >= 0:
            return f"exited with status {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        hint = {
            "SIGKILL": ", perhaps by the kernel for lack of memory",
            "SIGSEGV": " (a crash inside an operator)",
            "SIGABRT": " (an operator gave up)",
            "SIGXFSZ": " (a file beyond the size limit)",
        }.get(name, "")
        return f"was killed by signal {-code} ({name}){hint}"


def launch(
    target: str,
    *,
    scratch: Path,
    options: Mapping[str, Any],
    limits: Mapping[str, int] | None = None,
    readable: Sequence[str] = (),
    threads: int | None = None,
) -> Confined:
    """Start a confined Python process that runs `target.serve`.

    Returns at once; the process confines itself, imports, and says `ready` on its channel.

    Args:
        target: module with `serve(channel, isolation, options)`.
        scratch: where to make its folders.
        options: passed on, as JSON.
        limits: resource limits beside "no core dumps".
        readable: further paths it may read.
        threads: CPU threads for numeric libraries.
    """
    folder = Path(tempfile.mkdtemp(prefix="child-", dir=scratch))
    for name in ("in", "out"):
        (folder / name).mkdir()
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    order = {
        "target": target,
        "channel_fd": theirs.fileno(),
        "lifeline_fd": reading,
        "readable": [str(folder / "in"), *readable],
        "writable": [str(folder / "out")],
        "limits": {"CORE": 0, **(limits or {})},
        "options": {**options, "inbox": str(folder / "in"), "outbox": str(folder / "out")},
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "curvature_worker.bootstrap", json.dumps(order)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        pass_fds=(theirs.fileno(), reading),
        env=_environment(folder / "out", threads),
        cwd=folder,
        start_new_session=True,
    )
    theirs.close()
    os.close(reading)
    return Confined(process, Channel(ours), writing, folder)


def _environment(home: Path, threads: int | None) -> dict[str, str]:
    """Nothing of ours: no secrets, no settings."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environment
