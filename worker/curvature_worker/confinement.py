"""What a confined process gives up, in the process itself, before anything untrusted or heavy is imported.

Order matters: NumPy and torch start threads when imported, and Landlock binds only the calling thread and what it
starts later. So: resource limits, Landlock (files), seccomp (system calls), and only then the imports.
"""

import errno
import os
import resource
import sys
from collections.abc import Iterable, Mapping
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
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "setxattr", "lsetxattr", "fsetxattr"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "mknod", "mknodat"),
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset"),
    *("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "io_uring_setup"),
    *("reboot", "swapon", "swapoff", "init_module", "finit_module", "delete_module", "kexec_load", "settimeofday"),
)
_CLONE_THREAD = 0x00010000


def confine(readable: Iterable[str], writable: Iterable[str], limits: Mapping[str, int]) -> str:
    """Confine this process for good; returns what is in force, e.g. `"landlock+seccomp+rlimits"`.

    Args:
        readable: folders and files that may be read beside the Python installation and system libraries.
        writable: folders in which files may be made and changed.
        limits: resource name without `RLIMIT_` (`"AS"`, `"CORE"`) → limit.
    """
    in_force = []
    seccomp = _find_seccomp()  # finding the library runs programs, which Landlock would not let it
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
    for name in _DENIED_CALLS:
        try:
            rules.add_rule(denied, name)
        except (OSError, ValueError):
            continue  # this architecture has no such call
    # Threads are clones that share everything; any other clone would be a process. clone3 hides its flags behind a
    # pointer: "not implemented" makes the C library fall back to clone.
    rules.add_rule(denied, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(absent, "clone3")
    try:
        rules.load()
    except OSError:
        return False
    return True
