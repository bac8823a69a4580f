"""What a confined process gives up, in the process itself, before anything untrusted or heavy is imported.

Order matters: NumPy and torch start threads when imported, and Landlock binds only the calling thread and what it
starts later. So: capabilities, Landlock (files), seccomp (system calls), resource limits, and only then the imports.
"""

import ctypes
import errno
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_READ_ONLY = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/driver/nvidia",
    "/sys/devices",
    "/sys/bus/pci",
    "/sys/module/nvidia",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
)
_DENIED_CALLS = (
    *("execve", "execveat", "fork", "vfork"),
    *("socket", "socketpair", "bind", "connect", "listen", "accept", "accept4"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kcmp"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "process_madvise", "process_mrelease"),
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
    *("utime", "utimes", "futimesat", "utimensat"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "mknod", "mknodat"),
    *("mount_setattr", "move_mount", "open_tree", "fsopen", "fsmount", "fspick", "name_to_handle_at"),
    *("open_by_handle_at", "quotactl", "acct", "fanotify_init", "inotify_init", "inotify_init1"),
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset"),
    *("shmget", "shmat", "msgget", "semget", "mq_open"),
    *("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "io_uring_setup"),
    *("reboot", "swapon", "swapoff", "init_module", "finit_module", "delete_module", "kexec_load", "settimeofday"),
)
_DENIED_NUMBERS = {
    "fchmodat2": 452,
    "setxattrat": 463,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_setattr": 469,
}
"""Calls younger than the common libseccomp, which does not know their names; the numbers are one for all machines."""

_CLONE_THREAD = 0x00010000
_F_SETLEASE = 1024
_SIGNALLING_FCNTLS = {"F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15}
_SIGNALLING_IOCTLS = {"FIOSETOWN": 0x8901, "SIOCSPGRP": 0x8902}
_PR_SET_PDEATHSIG = 1
_32_BITS = 0xFFFFFFFF
_CAPABILITIES_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 1 << 2


def confine(readable: Iterable[str], writable: Iterable[str], limits: Mapping[str, int]) -> str:
    """Confine this process for good; returns what is in force, e.g. `"landlock+seccomp+rlimits"`.

    Args:
        readable: folders and files that may be read beside the Python installation and system libraries.
        writable: folders in which files may be made and changed.
        limits: resource name without `RLIMIT_` (`"AS"`, `"CORE"`) → limit.
    """
    in_force = []
    seccomp = _find_seccomp()  # finding the library runs programs, which Landlock would not let it
    _drop_capabilities()
    if _restrict_files([*readable, *_python_paths()], writable):
        in_force.append("landlock")
    if seccomp is not None and _restrict_calls(seccomp):
        in_force.append("seccomp")
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        ceiling = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (ceiling, ceiling))
    in_force.append("rlimits")
    return "+".join(in_force) if len(in_force) > 1 else f"{in_force[0]} only"


def _drop_capabilities() -> None:
    """Root without its powers, such as making the store's files immutable through a read-only descriptor.

    One stays, to read what others own: the Python installation may lie in somebody's private home, and Landlock
    decides about reading.
    """
    if sys.platform != "linux":
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, for the lower and the higher 32
    libc = ctypes.CDLL(None)
    if libc.capget(header, held) != 0:
        return
    kept = held[1] & _CAP_DAC_READ_SEARCH
    libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0))


def _python_paths() -> list[str]:
    """The interpreter and everything on the import path."""
    return [sys.prefix, sys.base_prefix, *(path for path in sys.path if path)]


def _restrict_files(readable: Iterable[str], writable: Iterable[str]) -> bool:
    try:
        from py_landlock import AccessFs, Landlock, LandlockError
    except ImportError:
        return False
    own = f"/proc/{os.getpid()}"
    devices = ["/dev/null", *(str(p) for p in Path("/dev").glob("nvidia*"))]
    try:
        # Not strict: an older kernel leaves out the rights it does not know.
        rules = Landlock(strict=False)
        for path in (*readable, *_READ_ONLY, own):
            if Path(path).exists():
                access = AccessFs.READ_FILE | AccessFs.READ_DIR if Path(path).is_dir() else AccessFs.READ_FILE
                rules.add_path_rule(path, access=access)
        for path in devices:
            if Path(path).exists() and not Path(path).is_dir():
                rules.add_path_rule(path, access=_file_rights(AccessFs))
        for path in writable:
            rules.add_path_rule(path, access=_folder_rights(AccessFs))
        rules.apply()
    except (LandlockError, OSError):
        return False
    return True


def _file_rights(access: Any) -> Any:
    rights = access.READ_FILE | access.WRITE_FILE
    return rights | access.IOCTL_DEV if hasattr(access, "IOCTL_DEV") else rights


def _folder_rights(access: Any) -> Any:
    rights = access.READ_FILE | access.WRITE_FILE | access.READ_DIR | access.MAKE_REG | access.MAKE_DIR
    rights |= access.REMOVE_FILE | access.REMOVE_DIR
    return rights | access.TRUNCATE if hasattr(access, "TRUNCATE") else rights


def _find_seccomp() -> Any:
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError):
        return None
    return pyseccomp


def _restrict_calls(seccomp: Any) -> bool:
    denied, absent = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for call in (*_DENIED_CALLS, *_DENIED_NUMBERS):
        try:
            rules.add_rule(denied, call)
        except (OSError, ValueError):
            if call in _DENIED_NUMBERS:
                rules.add_rule(denied, _DENIED_NUMBERS[call])
            # Otherwise this architecture has no such call.
    own = os.getpid()
    # Threads are clones that share everything; any other clone would be a process. clone3 hides its flags behind a
    # pointer: "not implemented" makes the C library fall back to clone.
    rules.add_rule(denied, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(absent, "clone3")
    # What is allowed may be compared in full: bits that the kernel ignores only make it denied.
    # abort() and the C library signal their own threads; nobody else's.
    rules.add_rule(denied, "tgkill", seccomp.Arg(0, seccomp.NE, own))
    # Limits of other processes; of its own (as 0) the C library asks.
    rules.add_rule(denied, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))
    for call, place, value in _denied_values():
        rules.add_rule(denied, call, seccomp.Arg(place, seccomp.MASKED_EQ, _32_BITS, value))
    try:
        rules.load()
    except OSError:
        return False
    return True


def _denied_values() -> Iterator[tuple[str, int, int]]:
    """(call, place of the argument, its value) of what is denied; the kernel reads 32 bits of such an argument."""
    # A lease on a file of the store would make its readers wait; dying with the worker is not to be revoked.
    yield "fcntl", 1, _F_SETLEASE
    yield "prctl", 0, _PR_SET_PDEATHSIG
    # A pipe or socket with an owner sends it signals, and SIGIO or one chosen ends it as well as kill() would.
    for command in _SIGNALLING_FCNTLS.values():
        yield "fcntl", 1, command
    for command in _SIGNALLING_IOCTLS.values():
        yield "ioctl", 1, command
