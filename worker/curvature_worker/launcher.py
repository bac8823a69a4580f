"""Starting confined processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curvature_worker.channel import Channel
from curvature_worker.child_output import ChildOutput
from curvature_worker.sealing import seal

_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
"""What tells glibc to keep freed memory, until `heap.give_back`.

By default it returns every large block at once, and the next pass through a net pays for fresh pages again: in virtual
machines that can take as long as the pass. Other C libraries do not read it.
"""
_SIGNAL_MEANINGS = {
    "SIGSEGV": " (a crash inside an operator)",
    "SIGABRT": " (an operator gave up)",
    "SIGXFSZ": " (a file beyond the size limit)",
}
_SIGNS_OF_LACK = ("bad_alloc", "MemoryError", "allocate memory", "out of memory", "Thread creation failed")


class Death(NamedTuple):
    """How a process ended: a code of the protocol, in words, and what to do about it."""

    code: str
    how: str
    remedy: str


class Confined:
    """A confined process and its folders: `inbox` it may read, `outbox` it may write.

    Attributes:
        channel: to talk to it.
        pid: its process id.
        greeting: what it said when it was ready.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel, lifeline: int, folder: Path) -> None:
        assert process.stdout is not None
        self._process = process
        self.channel = channel
        self._lifeline = lifeline
        self._folder = folder
        self._oom_kills = _count_oom_kills()
        self._output = ChildOutput(process.stdout, process.pid)  # type: ignore[arg-type]
        self._output.start()
        self.inbox, self.outbox = folder / "in", folder / "out"
        self.greeting: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def take(self, name: str) -> Path:
        """Move a file of the outbox to where the process can neither exchange nor change it any more.

        Raises:
            OSError: if there is no such file.
            FileInUse: if the process kept a way to change it.
        """
        taken = self._folder / "taken" / name
        (self.outbox / name).rename(taken)
        seal(taken)
        return taken

    def empty_outbox(self) -> None:
        """Remove what a job left behind, if the process was not killed and all of it is gone."""
        for folder in (self.outbox, self._folder / "taken"):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def end(self) -> None:
        """End it at once; its folders stay."""
        if self.alive:
            self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End it at once and remove its folders."""
        self.end()
        self.channel.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._output.join(1.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def death(self, wait_seconds: float = 2.0) -> Death:
        """How it died, in words for a user; one that merely stopped making sense is ended."""
        try:
            status = self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            self.end()
            return Death("worker_crashed", "stopped making sense and was ended", "report the model")
        how, lacked = _explain(status), any(sign in self._output.last_words() for sign in _SIGNS_OF_LACK)
        if status == -signal.SIGKILL and _count_oom_kills() > self._oom_kills:
            how, lacked = f"{how} because the machine ran out of memory", True
        if lacked:
            return Death("out_of_memory", f"ran out of memory and {how}", "use a smaller batch or fewer extensions")
        return Death("worker_crashed", how, "try a smaller batch; if it persists, report the model")


def launch(
    target: str,
    *,
    scratch: Path,
    options: Mapping[str, Any],
    limits: Mapping[str, int] | None = None,
    import_paths: Sequence[str] = (),
    threads: int | None = None,
) -> Confined:
    """Start a confined Python process that runs `target.serve`.

    Returns at once; the process confines itself, imports, and says `ready` on its channel. It ends with the calling
    thread (Linux ties it to that one), so call this from a thread that lives as long as the worker.

    Args:
        target: module with `serve(channel, isolation, options)`.
        scratch: where to make its folders.
        options: passed on, as JSON.
        limits: resource limits beside "no core dumps".
        import_paths: further folders to import from, where the target is not installed.
        threads: CPU threads for numeric libraries.
    """
    folder = Path(tempfile.mkdtemp(prefix="child-", dir=scratch))
    for name in ("in", "out", "taken"):
        (folder / name).mkdir()
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    order = {
        "target": target,
        "worker_pid": os.getpid(),
        "channel_fd": theirs.fileno(),
        "lifeline_fd": reading,
        "import_paths": list(import_paths),
        "readable": [str(folder / "in")],
        "writable": [str(folder / "out")],
        "limits": {"CORE": 0, **(limits or {})},
        "options": {**options, "inbox": str(folder / "in"), "outbox": str(folder / "out")},
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "curvature_worker.bootstrap", json.dumps(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(theirs.fileno(), reading),
        env=_environment(folder / "out", threads),
        cwd=folder,
        start_new_session=True,
    )
    theirs.close()
    os.close(reading)
    return Confined(process, Channel(ours), writing, folder)


def _environment(home: Path, threads: int | None) -> dict[str, str]:
    """Nothing of ours: no secrets, no settings."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # Large tensors in huge pages: else the faults of first touching them take as long as a backward pass.
    environment["THP_MEM_ALLOC_ENABLE"] = "1"
    environment |= KEEPING
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environment


def _explain(status: int) -> str:
    """A process's exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    return f"was killed by signal {-status} ({name}){_SIGNAL_MEANINGS.get(name, '')}"


def _count_oom_kills() -> int:
    """How many processes the kernel has ended for lack of memory; 0 where it does not tell."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
