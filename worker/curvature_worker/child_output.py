"""What a confined process prints, on its way to the worker's log.

It gets a pipe and not the log itself: a process that opens hostile files could cut the log short or forge it. Lines
come labelled, shortened, and not more of them than somebody would read.
"""

import logging
import threading
import time
from collections import deque
from typing import BinaryIO

logger = logging.getLogger("curvature.worker.child")

_KEPT_LINES = 30
_LINE_BYTES = 500
_LINES_PER_WINDOW = 200
_WINDOW_SECONDS = 10.0


class ChildOutput(threading.Thread):
    """Reads a process's output until it ends, logs it, and remembers the last lines."""

    def __init__(self, stream: BinaryIO, pid: int) -> None:
        super().__init__(daemon=True, name=f"output-{pid}")
        self._stream, self._pid = stream, pid
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._window_began, self._lines_in_window = time.monotonic(), 0

    def run(self) -> None:
        """Read to the end."""
        with self._stream:
            while part := self._stream.readline(_LINE_BYTES):
                line = part.decode(errors="replace").rstrip()
                if line:
                    self._last.append(line)
                    self._log(line)

    def last_words(self, wait_seconds: float = 1.0) -> str:
        """The last lines, once the process has ended."""
        self.join(wait_seconds)
        return "\n".join(self._last)

    def _log(self, line: str) -> None:
        now = time.monotonic()
        if now - self._window_began > _WINDOW_SECONDS:
            self._window_began, self._lines_in_window = now, 0
        self._lines_in_window += 1
        if self._lines_in_window <= _LINES_PER_WINDOW:
            logger.warning("process %d: %s", self._pid, _printable(line))
        elif self._lines_in_window == _LINES_PER_WINDOW + 1:
            logger.warning("process %d prints too much; some of it is left out", self._pid)


def _printable(line: str) -> str:
    """The line without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
