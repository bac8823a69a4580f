import os
import subprocess
import sys
from pathlib import Path

from curvature_worker.scratch import scratch_folder

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom curvature_worker.scratch import scratch_folder\n"
    "with scratch_folder(Path(sys.argv[1]), 'other') as folder:\n"
    "    (folder / 'file').write_text('x')\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def hold(parent):
    """Another worker with a scratch folder `other`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_is_made_and_removed(tmp_path):
    with scratch_folder(tmp_path / "new", "me") as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()


def test_what_a_killed_worker_left_is_removed(tmp_path):
    end(hold(tmp_path))
    assert (tmp_path / "other" / "file").exists()
    with scratch_folder(tmp_path, "me"):
        assert not (tmp_path / "other").exists()


def test_folders_of_living_workers_stay(tmp_path):
    other = hold(tmp_path)
    try:
        with scratch_folder(tmp_path, "me"):
            assert (tmp_path / "other" / "file").exists()
    finally:
        end(other)


def test_what_is_no_workers_folder_stays(tmp_path):
    (tmp_path / "precious").mkdir()
    with scratch_folder(tmp_path, "me"):
        assert (tmp_path / "precious").exists()


def test_locks_are_not_inherited(tmp_path):
    with scratch_folder(tmp_path, "me") as folder:
        held = [fd for fd in Path("/proc/self/fd").iterdir() if _target(fd) == folder / ".lock"]
        assert held
        assert not any(os.get_inheritable(int(fd.name)) for fd in held)


def _target(fd):
    try:
        return fd.readlink()
    except OSError:
        return None
