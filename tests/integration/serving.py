"""`curvature serve` as a user starts it, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

CURVATURE = str(Path(sys.executable).with_name("curvature"))
START_SECONDS = 90.0


class Server:
    """A running embedded server on a data folder."""

    def __init__(self, data_dir, *options, port=0, command=(CURVATURE,)):
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "serve", "--port", str(port), "--data-dir", str(data_dir), "--threads", "1", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CURVATURE_LEASE_SECONDS": "3"},
            )
        found = wait_for(self._ready_line, START_SECONDS, "the server to get ready")
        self.url = found[1]

    def _ready_line(self):
        text = self.log.read_text(errors="replace")
        found = re.search(r"ready at (\S+)", text)
        assert found or self.process.poll() is None, f"the server ended while starting:\n{text}"
        return found

    def stop(self, number=signal.SIGINT):
        """As Ctrl-C does; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def processes(self):
        """Everything it started that runs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, *words):
        """The processes whose command line has all the words, guardians left out."""
        found = []
        for process in self.processes():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if all(any(word in part for part in line) for word in words) and "-c" not in line:
                found.append(process)
        return found

    def worker(self):
        """The worker process."""
        return self.find("-m", "curvature_worker", "--device")[0]

    def children(self):
        """The confined processes that compute."""
        return self.find("curvature_worker.bootstrap", "curvature_worker.child")


def wait_for(look, seconds, what):
    """The first true value that `look` returns."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain for {what}")
