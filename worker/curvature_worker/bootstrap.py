"""The first thing a confined process runs: confine, then import its real work.

Started by `launcher.py` as `python -m curvature_worker.bootstrap <JSON>`; imports nothing heavy before `confine`.
"""

import importlib
import json
import os
import socket
import sys
import threading

from curvature_worker.channel import Channel
from curvature_worker.confinement import confine


def main() -> None:
    """Confine this process and hand over to the target module's `serve(channel, isolation, options)`."""
    order = json.loads(sys.argv[1])
    channel = Channel(socket.socket(fileno=order["channel_fd"]))
    isolation = confine(order["readable"], order["writable"], order["limits"])
    _die_with_the_worker(order["lifeline_fd"])
    importlib.import_module(order["target"]).serve(channel, isolation, order["options"])


def _die_with_the_worker(fd: int) -> None:
    """End as soon as the worker is gone, however it went: the pipe's other end closes with it."""

    def wait() -> None:
        os.read(fd, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
