"""Results and batches that are larger than what a confined child may take."""

import pytest
import torch
from tests.worker.conftest import make_settings
from tests.worker.desk import Desk
from torch import nn

import curvature_engine as engine
from curvature_protocol.jobs import JobStatus
from curvature_state import migrate
from curvature_worker.memory import analysis_budget
from curvature_worker.pool import ChildPool


@pytest.fixture
def desk_with(tmp_path, redis_url):
    """A desk whose pool has settings of its own."""
    opened = []

    def make(**changes):
        settings = make_settings(tmp_path, redis_url, **changes)
        migrate(settings.database_url)
        pool = ChildPool(settings, tmp_path)
        pool.open()
        opened.extend([desk := Desk(settings, pool, tmp_path), pool])
        return desk

    yield make
    for each in opened:
        each.close()


def test_a_result_beyond_the_budget_is_written_as_it_is_made(desk_with):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 5))
    x, targets = torch.randn(32, 200), torch.randint(0, 5, (32,))
    desk = desk_with(budget_bytes=2 * 2**20)
    job = desk.run(desk.submit(module, (x, targets), ["batch_grad", "variance", "kfac"]))
    assert job.status == JobStatus.SUCCEEDED, job.error
    expected = engine.analyze(torch.jit.script(module), x, targets, ["batch_grad", "variance", "kfac"])
    for label in ("batch_grad", "variance", "kfac"):
        stored = desk.tensors(job, label)
        assert stored.keys() == expected.groups[label].tensors.keys()
        for name, tensor in expected.groups[label].tensors.items():
            torch.testing.assert_close(stored[name], tensor, rtol=1e-4, atol=1e-8)
    group = desk.manifest(job).groups[0]
    assert group.file_bytes > 32 * 4 * 60_000
    assert [t.name for t in group.tensors] == list(expected["batch_grad"])
    assert list(desk.child().outbox.iterdir()) == []


def test_the_manifest_says_how_the_batch_was_divided(desk_with):
    module, x = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 5)), torch.randn(64, 200)
    desk = desk_with(budget_bytes=2**17)
    job = desk.run(desk.submit(module, (x, torch.arange(64) % 5), ["variance", "batch_loss"]))
    assert job.status == JobStatus.SUCCEEDED, job.error
    entries = [tensor.provenance for group in desk.manifest(job).groups for tensor in group.tensors]
    assert len({entry.samples_per_chunk for entry in entries}) == 1
    assert 1 < entries[0].samples_per_chunk < 64
    assert {entry.halvings for entry in entries} == {0}


def test_the_default_budget_is_half_of_what_the_child_may_take(tmp_path, redis_url):
    settings = make_settings(tmp_path, redis_url, memory_limit_bytes=8 * 2**30)
    assert analysis_budget(settings) == 4 * 2**30
    assert analysis_budget(settings.model_copy(update={"budget_bytes": 5})) == 5
    assert analysis_budget(settings.model_copy(update={"device": "cuda"})) is None
