"""The first thing a confined process runs: confine, then import its real work.

Started by `launcher.py` as `python -m curvature_worker.bootstrap <JSON>`; imports nothing heavy before `confine`.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from curvature_worker.channel import Channel
from curvature_worker.confinement import confine

_PR_SET_PDEATHSIG = 1
_OOM_SCORE = 600


def main() -> None:
    """Confine this process and hand over to the target module's `serve(channel, isolation, options)`."""
    order = json.loads(sys.argv[1])
    channel = Channel(socket.socket(fileno=order["channel_fd"]))
    sys.path.extend(order["import_paths"])
    _volunteer_for_the_oom_killer()
    _die_with_the_worker(order["worker_pid"])
    isolation = confine(order["readable"], order["writable"], order["limits"])
    _watch_lifeline(order["lifeline_fd"])
    importlib.import_module(order["target"]).serve(channel, isolation, order["options"])


def _volunteer_for_the_oom_killer() -> None:
    """When the machine runs out of memory, the computation goes, not the worker, the API or the database."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))


def _die_with_the_worker(worker_pid: int) -> None:
    """Have the kernel end this process when the worker's thread that started it ends, however that ends.

    The kernel's signal needs nothing of this process: a long operator that holds the interpreter lock dies too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != worker_pid:  # it was gone before the kernel knew
            os._exit(0)


def _watch_lifeline(fd: int) -> None:
    """The same for systems without that signal: the pipe's other end closes with the worker."""

    def wait() -> None:
        os.read(fd, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
