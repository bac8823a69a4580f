"""Making sure that a file which came from an untrusted process is not changed any more.

Moving it out of the process's folders is not enough: through a descriptor or a mapping kept from before, the process
would write on, into what was checked already. The kernel grants a read lease on a file only while nobody has it open
for writing; and nobody can open it again where it lies now.
"""

import errno
import fcntl
import os
import signal
import stat
import sys
from pathlib import Path

_COPY_BYTES = 2**20


class FileInUse(Exception):
    """The file can still be changed by others."""


def seal(path: Path) -> None:
    """Check that nobody else can write a file that was moved here; where the system cannot tell, make it a copy.

    Raises:
        FileInUse: if somebody can, through another name or what was opened before.
        OSError: if it cannot be read or copied.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise FileInUse(f"{path.name} is no regular file of its own")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _is_left_alone(descriptor, path.name):
            _copy(descriptor, path, status.st_size)
    finally:
        os.close(descriptor)


def _is_left_alone(descriptor: int, name: str) -> bool:
    """True if nobody has the file open for writing; False if this system or file system does not tell.

    Raises:
        FileInUse: if somebody has.
    """
    if sys.platform != "linux":
        return False
    try:
        # Whoever opened the file now would break the lease and have us signalled: by SIGIO, which ends a process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise FileInUse(f"{name} is still open for writing") from error
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _copy(descriptor: int, path: Path, size: int) -> None:
    """Put a copy in the file's place, of its size now: one that grows meanwhile would never end."""
    copy = path.with_name(f"{path.name}.copy")
    with copy.open("xb") as target:
        while (left := size - target.tell()) > 0 and (part := os.read(descriptor, min(left, _COPY_BYTES))):
            target.write(part)
    copy.replace(path)
