import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.worker.desk import wait_until

from curvature_worker.confinement import confine
from curvature_worker.inbox import batch_name
from curvature_worker.launcher import launch

TARGETS = Path(__file__).parent / "targets"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(platform.system() != "Linux", reason="Landlock and seccomp are Linux"),
]

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="calls by x86-64 number")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("confined")


@pytest.fixture(scope="module")
def secret(folder):
    """A file of the data folder, as another tenant's model."""
    path = folder / "data" / "secret"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.fixture(scope="module")
def bystander():
    """A process of the same user that is none of the child's business."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"API_KEY": "secret"})
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def child(folder, secret):
    process = launch("attacks", scratch=folder, options={}, import_paths=[str(TARGETS)])
    process.greeting = process.channel.receive(60)
    if {"landlock", "seccomp"} - set(process.greeting["isolation"].split("+")):
        process.kill()
        pytest.skip(f"this kernel gives {process.greeting['isolation']} only")
    yield process
    process.kill()


@pytest.fixture(scope="module")
def original(child, folder):
    """The store's file, hard-linked into the inbox after the process confined itself."""
    path = folder / "store"
    path.write_text("the store's")
    (child.inbox / "model").hardlink_to(path)
    return path


@pytest.fixture
def attack(child):
    def run(name, target=None):
        child.channel.send({"attack": name, "target": target})
        return child.channel.receive(30)

    return run


@pytest.mark.parametrize("name", ["read", "read in a thread", "write", "remove", "chmod", "chown", "set times"])
def test_foreign_files_are_out_of_reach(attack, secret, name):
    assert attack(name, str(secret))["denied"]
    assert secret.read_text() == "secret"


@on_x86
def test_calls_younger_than_the_library_are_denied(attack, secret):
    mode = secret.stat().st_mode
    assert attack("fchmodat2", str(secret))["denied"]
    assert secret.stat().st_mode == mode


@pytest.mark.parametrize("path", ["/etc/passwd", "/root/.bashrc", "/proc/1/environ"])
def test_system_files_are_not_read(attack, path):
    assert attack("read", path)["denied"]


def test_environments_of_others_are_not_read(attack, bystander):
    assert attack("read", f"/proc/{bystander.pid}/environ")["denied"]


@pytest.mark.parametrize("path", ["/", "/tmp", "/etc", "/proc"])
def test_folders_are_not_listed(attack, path):
    assert attack("list", path)["denied"]


def test_nothing_is_written_outside(attack, folder):
    assert attack("make", str(folder / "new"))["denied"]
    assert not (folder / "new").exists()


def test_folders_of_other_children_are_out_of_reach(attack, folder):
    other = launch("attacks", scratch=folder, options={}, import_paths=[str(TARGETS)])
    try:
        (other.inbox / "model").write_text("theirs")
        assert attack("read", str(other.inbox / "model"))["denied"]
        assert attack("list", str(other.outbox))["denied"]
    finally:
        other.kill()


def test_files_linked_into_the_inbox_later_can_be_read(attack, original):
    assert "the store's" in attack("read inbox")["came"]


@pytest.mark.parametrize(
    "name",
    [
        "write inbox",
        "truncate inbox",
        "make in inbox",
        "remove from inbox",
        "chmod inbox",
        "set inbox times",
        "make inbox immutable",
        "map inbox writable",
        "reopen inbox for writing",
        "lease inbox",
        pytest.param("lease inbox with more bits", marks=on_x86),
        "hard link out of inbox",
        "move out of inbox",
    ],
)
def test_the_store_is_not_changed_through_the_inbox(attack, original, name):
    before = original.stat()
    assert attack(name)["denied"], name
    after = original.stat()
    assert original.read_text() == "the store's"
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)


@pytest.mark.parametrize("name", ["symlink in outbox", "fifo in outbox"])
def test_the_outbox_takes_regular_files_only(attack, name):
    assert attack(name)["denied"]


@pytest.mark.parametrize("name", ["exec", "subprocess", "fork"])
def test_no_other_program_is_started(attack, name):
    assert attack(name)["denied"]


@on_x86
def test_a_clone_that_is_no_thread_is_denied(attack):
    assert attack("clone")["denied"]


@pytest.mark.parametrize("name", ["kill", "limit others", pytest.param("tgkill", marks=on_x86)])
def test_other_processes_are_left_alone(attack, bystander, name):
    assert attack(name, bystander.pid)["denied"]
    assert bystander.poll() is None


@on_x86
@pytest.mark.parametrize(
    "name",
    [
        "own a pipe",
        "own a pipe with more bits",
        "own a pipe, extended",
        "choose a pipe's signal",
        "own a socket",
        "own a socket by its older name",
    ],
)
def test_nothing_is_made_to_signal_other_processes(attack, bystander, name):
    assert attack(name, bystander.pid)["denied"]


@on_x86
def test_other_processes_are_not_traced(attack, bystander):
    assert attack("trace", bystander.pid)["denied"]


@pytest.mark.parametrize("name", ["tcp", "unix socket", "socket pair"])
def test_there_is_no_network(attack, name):
    assert attack(name)["denied"]


@on_x86
@pytest.mark.parametrize(
    "name", ["io_uring", "shared memory", "new namespace", "outlive the worker", "outlive the worker with more bits"]
)
def test_ways_around_are_closed(attack, name):
    assert attack(name)["denied"]


def test_another_user_it_does_not_become(attack):
    assert attack("become another user")["denied"]


def test_root_keeps_no_power_but_reading(attack):
    assert int(attack("capabilities")["came"]) & ~(1 << 2) == 0


def test_the_environment_holds_nothing_of_ours(attack, monkeypatch):
    assert "CURVATURE" not in attack("environment")["came"]


@pytest.mark.parametrize("name", ["write outbox", "thread", "random", "own descriptors"])
def test_what_a_computation_needs_works(attack, name):
    assert not attack(name)["denied"]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_confined_child_loads_computes_and_writes(folder, threads):
    process = launch(
        "curvature_worker.child",
        scratch=folder,
        options={"device": "cpu", "threads": threads, "programs_kept": 2, "programs_bytes": 2**30},
    )
    try:
        assert process.channel.receive(60)["event"] == "ready"
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
        )
        torch.jit.save(torch.jit.script(net), str(process.inbox / "model"))
        batch = {"inputs": torch.randn(64, 1, 8, 8), "targets": torch.arange(64) % 3}
        save_file(batch, process.inbox / batch_name("batch"))
        request = {
            "loss": None,
            "reduction": "mean",
            "seed": 0,
            "parameters": "trainable",
            "eval": True,
            "verify": False,
            "precision": "float32",
            "channels_last": False,
        }
        wanted = [{"name": "diag_ggn_exact", "label": "d", "options": {}}]
        order = {"kind": "analysis", "model": "model", "batch": "batch", "part": None, "most_bytes": None}
        process.channel.send({**order, "request": {**request, "extensions": wanted}})
        reply = wait_until(lambda: (m := process.channel.receive(10)) and m["event"] != "progress" and m)
        assert reply["event"] == "done", reply
        assert (process.outbox / "d.safetensors").stat().st_size > 0
    finally:
        process.kill()


def test_limits_come_into_force_and_are_never_raised():
    code = (
        "import resource; from curvature_worker.confinement import confine\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "print(confine([], ['/tmp'], {'NOFILE': 300, 'CORE': 0}), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    came = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "rlimits" in came
    assert "(200, 200)" in came


def test_importing_it_confines_nobody():
    assert callable(confine)
    assert list(Path("/").iterdir())
