"""How much memory a child may take."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from curvature_worker.settings import WorkerSettings

_SHARE = 0.8
_BUDGET_SHARE = 0.5
_LEAST_BYTES = 2 * 2**30
"""Importing torch takes most of it."""


def child_memory_limit(settings: WorkerSettings) -> int | None:
    """Limit of a child's address space in bytes, or None for no limit.

    By default, most of the machine's memory: a computation that outgrows it is told so, instead of pushing everything
    else out. On CUDA there is no default, since its driver reserves far more addresses than it uses; nor where the
    system is not Linux, whose limits other systems do not keep.
    """
    if settings.memory_limit_bytes is not None:
        return settings.memory_limit_bytes
    if settings.device != "cpu" or sys.platform != "linux":
        return None
    return max(_LEAST_BYTES, int(_SHARE * available_bytes()))


def analysis_budget(settings: WorkerSettings) -> int | None:
    """What one analysis may take beside model and batch; None leaves it to the engine, which knows the card.

    By default half of what the child may take: the other half is for the process, models kept loaded, the batch.
    """
    if settings.budget_bytes is not None:
        return settings.budget_bytes
    if settings.device != "cpu":
        return None
    limit = child_memory_limit(settings)
    return int(_BUDGET_SHARE * (available_bytes() if limit is None else limit))


def available_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or what the control groups of this process leave of it.

    Args:
        root: where `proc` and `sys` are.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of this process's control groups, of either version, and of the groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container sees its own group as the mount itself, whatever its path outside.
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == mount or mount in folder.parents:
                yield from _read_limit(folder / name)


def _read_limit(path: Path) -> list[int]:
    """The limit that stands in a file, if it is there and is one."""
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []
