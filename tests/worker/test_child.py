import os
import platform
import queue
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file
from tests.worker import models
from tests.worker.desk import script

import curvature_engine as engine
from curvature_worker import child as child_module
from curvature_worker.channel import Channel, ChannelClosed
from curvature_worker.child import Child, Programs, read_batch
from curvature_worker.inbox import batch_name
from curvature_worker.launcher import KEEPING

X, Y = torch.zeros(2, 4), torch.arange(2)


@pytest.fixture
def read(tmp_path):
    def run(tensors):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "batch")
        return read_batch(tmp_path / "batch")

    return run


def test_one_tensor_is_the_input(read):
    inputs, targets = read({"inputs": X, "targets": Y})
    assert torch.equal(inputs, X)
    assert torch.equal(targets, Y)


def test_numbered_tensors_are_positional_inputs_in_the_order_of_their_numbers(read):
    inputs, _ = read({**{f"inputs.{i}": torch.full((1,), float(i)) for i in range(11)}, "targets": Y})
    assert [int(t) for t in inputs] == list(range(11))


def test_named_tensors_are_inputs_by_name(read):
    inputs, _ = read({"inputs.x": X, "inputs.mask": Y, "targets": Y})
    assert set(inputs) == {"x", "mask"}


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"inputs": X}, "no tensor named targets"),
        ({"targets": Y}, "inputs are named"),
        ({"inputs": X, "more": X, "targets": Y}, "inputs are named"),
        ({"inputs": X, "inputs.1": X, "targets": Y}, "inputs are named"),
        ({"inputs.0": X, "inputs.2": X, "targets": Y}, "without gaps"),
    ],
)
def test_a_batch_of_another_form_is_refused_with_what_it_holds(read, tensors, part):
    with pytest.raises(engine.EngineError, match=part) as caught:
        read(tensors)
    assert caught.value.code == "invalid_batch"
    assert "it holds" in caught.value.remedy


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "batch").write_bytes(b"no safetensors")
    with pytest.raises(engine.EngineError) as caught:
        read_batch(tmp_path / "batch")
    assert caught.value.code == "invalid_batch"


class TestPrograms:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in "abc":
            (tmp_path / name).write_bytes(script(models.small()))
        return tmp_path

    def test_a_loaded_program_is_kept(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        assert programs.load("a", eval=True) is programs.load("a", eval=True)

    def test_modes_are_kept_apart(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        assert programs.load("a", eval=True) is not programs.load("a", eval=False)

    def test_the_least_recently_used_goes_first(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        for name in ("a", "b", "a", "c"):
            programs.load(name, eval=True)
        assert [name in programs for name in (("a", True), ("b", True), ("c", True))] == [True, False, True]

    def test_large_ones_make_room_for_each_other(self, folder):
        size = (folder / "a").stat().st_size
        programs = Programs(torch.device("cpu"), folder, 8, size + 10)
        programs.load("a", eval=True)
        programs.load("b", eval=True)
        assert ("a", True) not in programs


def test_memory_waits_only_for_orders_alike(tmp_path, monkeypatch):
    dropped = []
    monkeypatch.setattr(child_module.heap, "give_back", lambda: dropped.append(len(dropped)))
    child = Child(None, None, tmp_path, tmp_path, 1)
    monkeypatch.setattr(child, "_channel", type("Channel", (), {"send": lambda self, message: None})())
    child._answers = dict.fromkeys(child._answers, lambda order: {})
    for name, size in (("a", 10), ("b", 10), ("c", 11)):
        (tmp_path / batch_name(name)).write_bytes(b"x" * size)
    run = {"kind": "analysis", "model": "m", "batch": "a"}
    orders = [
        (run, True),
        (run, False),
        ({**run, "batch": "b"}, False),
        ({**run, "batch": "c"}, True),
        ({**run, "batch": "c", "model": "n"}, True),
        ({"kind": "inspection", "model": "n"}, True),
        ({"kind": "merge", "extensions": []}, True),
        (run, True),
        (run, False),
    ]
    for order, drops in orders:
        before = len(dropped)
        child.answer(order)
        assert (len(dropped) > before) == drops, order


def test_memory_is_given_back_when_no_order_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(child_module, "_IDLE_SECONDS", 0.01)
    given = queue.Queue()
    monkeypatch.setattr(child_module.heap, "give_back", lambda: given.put("back"))
    ours, theirs = (Channel(end) for end in socket.socketpair())
    child = Child(theirs, None, tmp_path, tmp_path, 1)
    child._answers = {"plan": lambda order: {"event": "done"}}

    def serve():
        with suppress(ChannelClosed):
            child.work()

    thread = threading.Thread(target=serve)
    thread.start()
    ours.send({"kind": "plan", "model": "m"})
    assert ours.receive(30) == {"event": "done"}
    assert [given.get(timeout=30) for _ in range(2)] == ["back"] * 2, "once for the order, once when none came"
    with pytest.raises(queue.Empty):  # from now on it waits for as long as it takes
        given.get(timeout=0.1)
    ours.send({"kind": "plan", "model": "m"})
    assert ours.receive(30) == {"event": "done"}
    ours.close()
    thread.join(30)
    assert not thread.is_alive()
    theirs.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_freed_memory_is_kept_until_it_is_given_back():
    code = """
import os, torch
from curvature_worker import heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

tensors = [torch.ones(2**24) for _ in range(8)]
held = resident()
del tensors
kept = resident()
heap.give_back()
print(held, kept, resident())
"""
    environment = {**os.environ, **KEEPING}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    held, kept, left = (int(number) / 2**20 for number in run.stdout.split())
    assert kept > held - 100
    assert left < held - 400
