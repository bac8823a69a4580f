import os
import signal

import pytest
from tests.worker.desk import wait_until

from curvature_worker.errors import JobStopped, WorkerUnfit
from curvature_worker.memory import analysis_budget
from curvature_worker.pool import ChildPool
from curvature_worker.settings import WorkerSettings

pytestmark = pytest.mark.integration


def go_on():
    return


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.alive)


@pytest.fixture
def make(settings, scratch, children_of_this_process):
    """Pools of a scratch folder of their own, closed at the end."""
    made = []

    def run(**changes):
        pool = ChildPool(settings.model_copy(update=changes), scratch)
        made.append(pool)
        return pool

    yield run
    for pool in made:
        pool.close()


class TestOnePool:
    """What leaves the shared pool as fit as it was."""

    def test_the_first_child_says_what_it_is(self, shared_pool):
        assert shared_pool.greeting["device"] == "cpu"
        assert shared_pool.greeting["budget_bytes"] == analysis_budget(WorkerSettings())
        assert {e["name"] for e in shared_pool.greeting["catalogue"]["extensions"]} >= {"batch_grad", "kfac"}

    def test_a_tenant_keeps_its_child(self, shared_pool):
        assert shared_pool.acquire("default", go_on) is shared_pool.acquire("default", go_on)

    def test_a_child_that_died_while_idle_is_replaced(self, shared_pool):
        first = shared_pool.acquire("default", go_on)
        kill(first)
        second = shared_pool.acquire("default", go_on)
        assert second.alive
        assert second.pid != first.pid

    def test_a_spare_that_died_while_idle_is_replaced(self, shared_pool):
        kill(shared_pool._spare)
        shared_pool.discard("default")
        assert shared_pool.acquire("default", go_on).alive

    def test_what_ends_the_wait_for_a_child_leaves_it_to_the_next(self, shared_pool):
        shared_pool.discard("default")
        shared_pool.acquire("default", go_on)
        shared_pool.discard("default")
        spare = shared_pool._spare

        def stopped():
            raise JobStopped

        if not spare.greeting:
            with pytest.raises(JobStopped):
                shared_pool.acquire("default", stopped)
        assert shared_pool.acquire("default", go_on) is spare


def test_tenants_do_not_share_and_the_oldest_goes_first(make, scratch):
    pool = make(children_kept=1)
    first = pool.acquire("a", go_on)
    second = pool.acquire("b", go_on)
    assert first.pid != second.pid
    assert not first.alive
    pool.close()
    assert list(scratch.iterdir()) == []


def test_a_device_that_is_not_there_is_named(make):
    with pytest.raises(WorkerUnfit, match=r"device cuda:99 does not exist.*--device cpu"):
        make(device="cuda:99").open()


def test_a_child_that_does_not_come_up_in_time_is_given_up(make):
    with pytest.raises(WorkerUnfit, match="did not start within"):
        make(start_seconds=0.01, poll_seconds=0.01).open()


def test_required_isolation_must_be_in_force(make):
    pool = make(require_isolation=True)
    with pytest.raises(WorkerUnfit, match="rlimits only"):
        pool._check_isolation("rlimits only")
    pool._check_isolation("landlock+seccomp+rlimits")
