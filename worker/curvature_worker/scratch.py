"""The worker's folder for files in flight, and what workers that were killed left of theirs."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def scratch_folder(parent: Path, worker_id: str) -> Iterator[Path]:
    """A folder for this worker, removed at the end; folders of dead workers on this machine are removed first.

    A worker holds a lock on its folder for as long as it lives; the kernel releases it however the worker ends, and
    process ids, which are used again, say nothing.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / worker_id
    with _locked(parent / _LOCK, wait=True):  # nobody takes a folder for stale that is just being made
        _remove_stale(parent)
        folder.mkdir()
        own = _lock(folder / _LOCK, wait=False)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(own)


def _remove_stale(parent: Path) -> None:
    for folder in parent.iterdir():
        if folder.is_dir() and not folder.is_symlink() and (folder / _LOCK).exists():
            with suppress(BlockingIOError), _locked(folder / _LOCK, wait=False):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    descriptor = _lock(path, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, *, wait: bool) -> int:
    """Lock a file; returns the descriptor that holds the lock.

    Raises:
        BlockingIOError: if somebody else holds it and we do not wait.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
