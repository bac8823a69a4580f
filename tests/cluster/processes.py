"""The processes of a running system by what they do, and what can be done to the system as a whole."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil

_PATTERNS = {
    "worker": r"curvature_worker",
    "child": r"curvature_worker\.bootstrap",
    "api": r"curvature_service",
    "broker": r".*unixsocket.*",
}
"""Role → what a part of the command line is like."""


class System(Protocol):
    """What is put to the test: a cluster, or the embedded server."""

    urls: Sequence[str]
    """Where its API processes answer."""
    database_url: str
    storage_url: str
    disturbances: dict[str, Callable[[], bool]]
    """What can be done to it as a whole, by name; False if it could not at that moment."""

    def roots(self) -> list[int]:
        """Process ids below which its processes are found."""
        ...


def find(system: System, role: str) -> list[psutil.Process]:
    """The running processes of a role: "worker", "child", "api" or "broker"."""
    found: dict[int, psutil.Process] = {}
    for root in system.roots():
        try:
            below = psutil.Process(root).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        found |= {process.pid: process for process in below if _has_role(process, role)}
    return list(found.values())


def cpu_seconds(roots: Sequence[int]) -> float:
    """CPU time that the processes below (and with) these have had, those that ended and were waited for among them."""
    found = 0.0
    for root in roots:
        try:
            for process in (parent := psutil.Process(root), *parent.children(recursive=True)):
                found += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return found


def _has_role(process: psutil.Process, role: str) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    # A guardian's command line holds that of its process, after its own `-c`.
    return "-c" not in line and any(re.fullmatch(_PATTERNS[role], part) for part in line)


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; nobody may have asked how."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(look: Callable[[], object], seconds: float, what: str) -> None:
    """Look until there is something to see."""
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)
