"""How much memory a child may take by default."""

import sys

import pytest

from curvature_worker import memory
from curvature_worker.memory import available_bytes, child_memory_limit
from curvature_worker.settings import WorkerSettings

GIB = 2**30

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep the limit")


@pytest.fixture
def root(tmp_path):
    """Makes a root with control groups: {path below sys/fs/cgroup: limit}."""

    def make(group, limits):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(group)
        for path, limit in limits.items():
            file = tmp_path / "sys/fs/cgroup" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")
        return tmp_path

    return make


def test_without_groups_it_is_the_machines(tmp_path):
    assert available_bytes(tmp_path) == available_bytes(tmp_path / "nowhere") > 0


@pytest.mark.parametrize(
    ("group", "limits"),
    [
        ("0::/\n", {"memory.max": 1000}),
        ("0::/pod/box\n", {"pod/box/memory.max": 1000, "pod/memory.max": 2000}),
        ("0::/pod/box\n", {"pod/box/memory.max": "max", "pod/memory.max": 1000}),
        ("0::/outside/docker\n", {"memory.max": 1000}),
        ("4:cpu:/\n2:memory:/docker/x\n", {"memory/docker/x/memory.limit_in_bytes": 1000}),
        ("2:memory:/docker/x\n", {"memory/memory.limit_in_bytes": 1000}),
    ],
    ids=["container", "own group", "group around", "path from outside", "version 1", "version 1 in a container"],
)
def test_the_smallest_limit_of_a_control_group_counts(root, group, limits):
    assert available_bytes(root(group, limits)) == 1000


def test_no_limit_is_no_limit(root):
    unlimited = root("0::/\n2:memory:/\n", {"memory.max": "max", "memory/memory.limit_in_bytes": 2**63 - 4096})
    assert available_bytes(unlimited) == available_bytes(unlimited / "nowhere")


@on_linux
@pytest.mark.parametrize(("available", "limit"), [(100 * GIB, 80 * GIB), (1 * GIB, 2 * GIB)])
def test_on_the_cpu_it_is_most_of_the_memory(monkeypatch, available, limit):
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    assert child_memory_limit(WorkerSettings(device="cpu")) == limit


def test_on_cuda_there_is_no_limit():
    assert child_memory_limit(WorkerSettings(device="cuda:1")) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_limit_that_is_set_counts(device):
    assert child_memory_limit(WorkerSettings(device=device, memory_limit_bytes=3 * GIB)) == 3 * GIB
