"""Run inside a confined process: tries what a hostile model would, and reports what came of it."""

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE = 0x10
_F_SETLEASE = 1024
_KEPT = []
_CHANNELS = []


def serve(channel, isolation, options):
    _CHANNELS.append(channel)
    channel.send({"event": "ready", "isolation": isolation})
    inbox, outbox = Path(options["inbox"]), Path(options["outbox"])
    while (order := channel.receive()) is not None:
        attack = ATTACKS[order["attack"]]
        try:
            came = attack(order.get("target"), inbox, outbox)
            channel.send({"event": "tried", "denied": False, "came": repr(came)})
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported)
            channel.send({"event": "tried", "denied": isinstance(error, OSError), "came": repr(error)})


def call(number, *arguments):
    """A system call by number, as code without a C library would make it."""
    if _LIBC.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_thread(attack):
    """The same from a thread started after the confinement."""

    def run(target, inbox, outbox):
        caught = []

        def work():
            try:
                attack(target, inbox, outbox)
            except OSError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if caught:
            raise caught[0]

    return run


def write(path):
    with Path(path).open("ab") as file:
        file.write(b"changed")


def set_immutable(path):
    with Path(path).open("rb") as file:
        fcntl.ioctl(file, _FS_IOC_SETFLAGS, struct.pack("l", _FS_IMMUTABLE))


def map_writable(path):
    with Path(path).open("rb") as file:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)


def reopen_for_writing(path):
    with Path(path).open("rb") as file:
        Path(f"/proc/self/fd/{file.fileno()}").open("r+b").close()


def lease(path):
    with Path(path).open("rb") as file:
        fcntl.fcntl(file, _F_SETLEASE, fcntl.F_RDLCK)


def lease_with_more_bits(path):
    with Path(path).open("rb") as file:
        call(72, file.fileno(), more_bits(_F_SETLEASE), fcntl.F_RDLCK)


def more_bits(number):
    """A number of which the kernel reads the lower 32 bits only."""
    return ctypes.c_ulong(number | 1 << 32)


def own_pipe(target, command, more=0):
    """Have a pipe send signals to a process."""
    reading, _ = os.pipe()
    call(72, reading, ctypes.c_ulong(command | more << 32), ctypes.c_long(target))


def own_pipe_extended(target):
    reading, _ = os.pipe()
    fcntl.fcntl(reading, 15, struct.pack("ii", 1, target))


def own_socket(target, command):
    """The same for the channel, the one socket there is."""
    fcntl.ioctl(_CHANNELS[0]._socket.fileno(), command, struct.pack("i", target))


def keep_descriptor(outbox):
    file = (outbox / "kept").open("wb+", buffering=0)
    file.write(b"honest")
    _KEPT.append(file)


def keep_mapping(outbox):
    with (outbox / "kept").open("wb+", buffering=0) as file:
        file.write(b"honest")
        _KEPT.append(mmap.mmap(file.fileno(), 6))


def forge_kept():
    file = _KEPT.pop()
    file.seek(0)
    file.write(b"forged")
    file.close()


def fork():
    if os.fork() == 0:
        os._exit(0)


def symlink_out(outbox):
    (outbox / "link").symlink_to("/etc/passwd")


def hard_link_out(inbox, outbox):
    (outbox / "mine").hardlink_to(next(inbox.iterdir()))


def first(inbox):
    return next(inbox.iterdir())


ATTACKS = {
    # Files
    "read": lambda target, i, o: Path(target).read_bytes(),
    "read in a thread": in_thread(lambda target, i, o: Path(target).read_bytes()),
    "list": lambda target, i, o: list(Path(target).iterdir()),
    "write": lambda target, i, o: write(target),
    "make": lambda target, i, o: Path(target).write_text("x"),
    "remove": lambda target, i, o: Path(target).unlink(),
    "chmod": lambda target, i, o: Path(target).chmod(0o777),
    "fchmodat2": lambda target, i, o: call(452, -100, os.fsencode(target), 0o777, 0),
    "chown": lambda target, i, o: os.chown(target, 1, 1),
    "set times": lambda target, i, o: os.utime(target, (0, 0)),
    # The inbox, whose files are the store's own
    "read inbox": lambda t, i, o: first(i).read_bytes(),
    "write inbox": lambda t, i, o: write(first(i)),
    "truncate inbox": lambda t, i, o: os.truncate(first(i), 0),
    "make in inbox": lambda t, i, o: (i / "new").write_text("x"),
    "remove from inbox": lambda t, i, o: first(i).unlink(),
    "chmod inbox": lambda t, i, o: first(i).chmod(0o666),
    "set inbox times": lambda t, i, o: os.utime(first(i), (0, 0)),
    "make inbox immutable": lambda t, i, o: set_immutable(first(i)),
    "map inbox writable": lambda t, i, o: map_writable(first(i)),
    "reopen inbox for writing": lambda t, i, o: reopen_for_writing(first(i)),
    "lease inbox": lambda t, i, o: lease(first(i)),
    "lease inbox with more bits": lambda t, i, o: lease_with_more_bits(first(i)),
    "hard link out of inbox": lambda t, i, o: hard_link_out(i, o),
    "move out of inbox": lambda t, i, o: first(i).rename(o / "mine"),
    # The outbox
    "write outbox": lambda t, i, o: (o / "result").write_text("x"),
    "symlink in outbox": lambda t, i, o: symlink_out(o),
    "keep descriptor": lambda t, i, o: keep_descriptor(o),
    "keep mapping": lambda t, i, o: keep_mapping(o),
    "forge": lambda t, i, o: forge_kept(),
    "fifo in outbox": lambda t, i, o: os.mkfifo(o / "fifo"),
    # Processes
    "exec": lambda t, i, o: os.execv("/bin/true", ["true"]),
    "subprocess": lambda t, i, o: subprocess.run(["/bin/true"], check=True),
    "fork": lambda t, i, o: fork(),
    "clone": lambda t, i, o: call(56, signal.SIGCHLD, 0, 0, 0, 0),
    "kill": lambda target, i, o: os.kill(target, signal.SIGKILL),
    "tgkill": lambda target, i, o: call(234, target, target, signal.SIGKILL),
    "trace": lambda target, i, o: call(101, 16, target, 0, 0),
    "limit others": lambda target, i, o: resource.prlimit(target, resource.RLIMIT_NOFILE, (3, 3)),
    "outlive the worker": lambda t, i, o: _LIBC.prctl(1, 0, 0, 0, 0) == 0 or call(157, 1, 0, 0, 0, 0),
    "outlive the worker with more bits": lambda t, i, o: call(157, more_bits(1), 0, 0, 0, 0),
    "own a pipe": lambda target, i, o: own_pipe(target, 8),
    "own a pipe with more bits": lambda target, i, o: own_pipe(target, 8, more=1),
    "own a pipe, extended": lambda target, i, o: own_pipe_extended(target),
    "choose a pipe's signal": lambda t, i, o: own_pipe(signal.SIGKILL, 10),
    "own a socket": lambda target, i, o: own_socket(target, 0x8901),
    "own a socket by its older name": lambda target, i, o: own_socket(target, 0x8902),
    "become another user": lambda t, i, o: os.setuid(65534),
    "new namespace": lambda t, i, o: call(272, 0x10000000),
    # The network
    "tcp": lambda t, i, o: socket.socket(),
    "unix socket": lambda t, i, o: socket.socket(socket.AF_UNIX),
    "socket pair": lambda t, i, o: socket.socketpair(),
    "io_uring": lambda t, i, o: call(425, 8, ctypes.create_string_buffer(256)),
    "shared memory": lambda t, i, o: call(29, 0, 4096, 0o1000),
    # What must work
    "thread": in_thread(lambda t, i, o: sum(range(1000))),
    "random": lambda t, i, o: os.urandom(8),
    "own descriptors": lambda t, i, o: list(Path("/proc/self/fd").iterdir()),
    "environment": lambda t, i, o: dict(os.environ),
    "capabilities": lambda t, i, o: int(
        next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("CapEff")).split()[1], 16
    ),
}
