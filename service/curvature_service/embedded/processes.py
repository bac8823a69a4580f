"""Processes that are started again when they die, and that die with their supervisor."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("curvature.serve")

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_STEADY_SECONDS = 20.0
_STOP_SECONDS = 8.0

_LIFELINE = (
    "import os,signal,subprocess,sys,threading\n"
    "process=subprocess.Popen(sys.argv[2:],pass_fds=[int(f) for f in os.environ.pop('CURVATURE_FDS','').split()])\n"
    "def follow():\n"
    "    os.read(int(sys.argv[1]),1)\n"
    "    process.terminate()\n"
    "    try: process.wait(5)\n"
    "    except subprocess.TimeoutExpired: process.kill()\n"
    "threading.Thread(target=follow,daemon=True).start()\n"
    "def end(number,frame): process.send_signal(signal.SIGTERM)\n"
    "for number in (signal.SIGTERM,signal.SIGINT): signal.signal(number,end)\n"
    "code=process.wait()\n"
    "sys.exit(code if code>=0 else 128-code)\n"
)
"""A guardian per process: when the supervisor goes, however it goes, the pipe closes and the process is ended.

(On Linux a parent-death signal would do, but it follows the thread that started the process, and other systems have
none.)
"""


class Supervised:
    """One process: started, watched, started again with growing pauses, stopped."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
        longest_pause_seconds: float = _LONGEST_PAUSE_SECONDS,
    ) -> None:
        self.name = name
        self._command, self._log = list(command), log
        self._environment, self._fds = dict(environment or {}), tuple(fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._started_at = 0.0
        self._start_again_at = 0.0
        self._pause, self._longest_pause = _FIRST_PAUSE_SECONDS, longest_pause_seconds

    def start(self) -> None:
        """Start it."""
        reading, self._lifeline = os.pipe()
        environment = {**os.environ, **self._environment, "CURVATURE_FDS": " ".join(map(str, self._fds))}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LIFELINE, str(reading), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(reading, *self._fds),
                start_new_session=True,
            )
        os.close(reading)
        self._started_at = time.monotonic()

    def look_after(self) -> None:
        """Start it again if it died, not more often than the pause allows."""
        if self._process is not None and self._process.poll() is not None:
            steady = time.monotonic() - self._started_at > _STEADY_SECONDS
            self._pause = _FIRST_PAUSE_SECONDS if steady else min(2 * self._pause, self._longest_pause)
            logger.warning("%s ended (status %s); starting it again", self.name, self._process.returncode)
            self._end_group(self._process.pid)
            self._forget()
            self._start_again_at = time.monotonic() + self._pause
        if self._process is None and time.monotonic() >= self._start_again_at:
            self.start()

    @property
    def guardian(self) -> int | None:
        """The process id of its guardian, whose child it is; None between an end and a new start."""
        return None if self._process is None else self._process.pid

    @property
    def failed_at_once(self) -> bool:
        """Whether it ended within moments of its start."""
        return self._process is not None and self._process.poll() is not None

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "")

    def stop(self) -> None:
        """End it, gently first."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._end_group(process.pid)
                process.wait()
        self._forget()

    @staticmethod
    def _end_group(leader: int) -> None:
        """End what a guardian that was itself killed left behind: it shares the guardian's process group."""
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)

    def _forget(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline, self._process = -1, None
