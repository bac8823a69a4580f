import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.worker.desk import wait_until

from curvature_worker import sealing
from curvature_worker.channel import ChannelClosed
from curvature_worker.launcher import launch
from curvature_worker.sealing import FileInUse

TARGETS = Path(__file__).parent / "targets"

pytestmark = pytest.mark.integration


@pytest.fixture
def process(scratch, children_of_this_process):
    made = launch("endings", scratch=scratch, options={}, import_paths=[str(TARGETS)])
    assert made.channel.receive(60) == {"event": "ready"}
    yield made
    made.kill()


def end(process, ending):
    """Have it end; returns how it died."""
    process.channel.send({"ending": ending})
    with pytest.raises(ChannelClosed):
        process.channel.receive(30)
    return process.death()


def test_an_exit_is_told_with_its_status(process):
    assert end(process, "exit").how == "exited with status 3"


def test_a_segmentation_fault_is_told(process):
    death = end(process, "segfault")
    assert death.code == "worker_crashed"
    assert "SIGSEGV" in death.how


def test_an_abort_is_told(process):
    assert "SIGABRT" in end(process, "abort").how


def test_an_abort_for_lack_of_memory_is_told_as_such(process):
    assert end(process, "bad_alloc").code == "out_of_memory"


def test_being_killed_is_told(process):
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        process.channel.receive(30)
    assert "SIGKILL" in process.death().how


def test_one_that_makes_no_sense_is_ended(process):
    process.channel.send({"ending": "garbage"})
    with pytest.raises(ChannelClosed):
        process.channel.receive(30)
    assert "making sense" in process.death(0.05).how
    assert not process.alive


def test_half_a_message_keeps_nobody_waiting(process):
    process.channel.send({"ending": "half a frame"})
    assert process.channel.receive(0.2) is None


def test_its_output_goes_to_the_log_and_cannot_flood_or_forge_it(process, caplog):
    process.channel.send({"ending": "chatter"})
    assert wait_until(lambda: process.channel.receive(30))
    end(process, "exit")
    lines = [record.getMessage() for record in caplog.records]
    assert 200 <= len(lines) < 300
    assert f"process {process.pid}: line 0 \\x1b[31m" in lines
    assert any("left out" in line for line in lines)


def test_killing_removes_its_folders(process, scratch):
    process.kill()
    assert list(scratch.iterdir()) == []


def test_a_file_taken_from_the_outbox_is_out_of_its_reach(process):
    (process.outbox / "result").write_text("x")
    taken = process.take("result")
    assert taken.read_text() == "x"
    assert process.outbox not in taken.parents


@pytest.fixture
def attacker(scratch, children_of_this_process):
    made = launch("attacks", scratch=scratch, options={}, import_paths=[str(TARGETS)])
    assert made.channel.receive(60)["event"] == "ready"

    def attack(name):
        made.channel.send({"attack": name})
        assert not (tried := made.channel.receive(30))["denied"], tried

    yield made, attack
    made.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file is copied")
@pytest.mark.parametrize("kept", ["keep descriptor", "keep mapping"])
def test_a_file_that_it_can_still_write_is_not_taken(attacker, kept):
    process, attack = attacker
    attack(kept)
    with pytest.raises(FileInUse, match="kept is still open for writing"):
        process.take("kept")


@pytest.mark.parametrize("kept", ["keep descriptor", "keep mapping"])
def test_where_no_lease_is_had_what_is_taken_is_a_copy(attacker, kept, monkeypatch):
    process, attack = attacker
    monkeypatch.setattr(sealing, "_is_left_alone", lambda descriptor, name: False)
    attack(kept)
    taken = process.take("kept")
    attack("forge")
    assert taken.read_bytes() == b"honest"


def test_emptying_the_outbox_of_a_killed_process_is_no_error(process):
    process.kill()
    process.empty_outbox()


def test_emptying_the_outbox_leaves_nothing(process):
    (process.outbox / "folder").mkdir()
    (process.outbox / "folder" / "file").write_text("x")
    (process.outbox / "file").write_text("x")
    process.take("file")
    process.empty_outbox()
    assert [p for p in process.outbox.parent.rglob("*") if p.is_file()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernel_would_end_it_before_the_worker(process):
    score = int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())
    assert score > int(Path("/proc/self/oom_score_adj").read_text())


@pytest.mark.parametrize(
    "ending",
    [
        "",
        pytest.param(
            "hold the interpreter",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux"),
        ),
    ],
    ids=["idle", "holding the interpreter"],
)
def test_it_dies_with_a_worker_that_is_killed(scratch, ending):
    parent = subprocess.Popen(
        [sys.executable, str(TARGETS / "parent.py"), str(scratch), str(TARGETS), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(parent.stdout.readline()))
    begun = time.monotonic()
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=5)
    assert time.monotonic() - begun < 2
    parent.stdin.close()
    parent.stdout.close()
