"""When memory runs out, the computation goes on in smaller pieces, says so, and gives the same numbers."""

import subprocess
import sys
import weakref

import pytest
import torch
from tests.engine.models import build, targets_for
from tests.engine.test_chunks import check_equal
from tests.engine.test_table import BY_NAME
from torch import nn

import curvature_engine as engine
from curvature_engine.closed_form import ClosedForm
from curvature_engine.passes import BackwardPasses
from curvature_engine.rules.linear import LinearRule

REQUESTS = ["grad", "batch_grad", "variance", "diag_ggn_exact", "sqrt_ggn_mc", "kflr"]
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


def setup(name="mlp"):
    module, inputs = build(BY_NAME[name])
    return engine.load(torch.jit.script(module)), inputs, targets_for(module(*inputs), "cross_entropy")


def pieces(result):
    """(samples per chunk, halvings) of all tensors."""
    entries = [entry for group in result.groups.values() for entry in group.provenance.values()]
    return {(entry["samples_per_chunk"], entry["halvings"]) for entry in entries}


def failing(original, fails):
    """`original`, without memory as long as `fails` says so of its arguments."""

    def method(self, *arguments):
        if fails(*arguments):
            raise RuntimeError(NO_MEMORY)
        return original(self, *arguments)

    return method


def test_a_block_is_written_out_in_halves(monkeypatch):
    program, inputs, targets = setup()
    whole = engine.analyze(program, inputs, targets, REQUESTS)
    too_large = failing(LinearRule.per_sample, lambda role, saved, g: len(g) > 1)
    monkeypatch.setattr(LinearRule, "per_sample", too_large)
    halved = engine.analyze(program, inputs, targets, REQUESTS)
    assert any("halved" in warning for warning in halved.warnings)
    assert halved.plan == whole.plan
    assert pieces(whole) == {(len(targets), 0)}
    ((samples, halvings),) = pieces(halved)
    assert samples == len(targets)
    assert halvings > 0
    assert any(f"halved {halvings} times" in warning for warning in halved.warnings)
    check_equal(whole, halved)


@pytest.mark.parametrize("fitting", [3, 2, 1])
def test_the_batch_is_halved_until_it_fits(monkeypatch, fitting):
    program, inputs, targets = setup()
    whole = engine.analyze(program, inputs, targets, REQUESTS)
    column = BackwardPasses._column
    monkeypatch.setattr(BackwardPasses, "_column", failing(column, lambda c, shares: len(c) > fitting))
    halved = engine.analyze(program, inputs, targets, REQUESTS)
    assert halved.plan.samples_per_chunk == (2 if fitting > 1 else 1)
    restarts = [warning for warning in halved.warnings if "began again with" in warning]
    assert pieces(halved) == {(halved.plan.samples_per_chunk, len(restarts))}
    assert len(restarts) == (1 if fitting > 1 else 2)
    check_equal(whole, halved)


def test_a_failed_attempt_keeps_no_graph(monkeypatch):
    program, inputs, targets = setup()
    alive, original = [], BackwardPasses._column

    def fails_once(self, *arguments):
        alive.append(weakref.ref(self))
        if len(alive) == 1:
            raise RuntimeError(NO_MEMORY)
        assert alive[0]() is None or alive[0]() is self
        original(self, *arguments)

    monkeypatch.setattr(BackwardPasses, "_column", fails_once)
    result = engine.analyze(program, inputs, targets, ["batch_grad"])
    assert result.plan.chunks == 2


WIDE = """
import resource
from pathlib import Path

import torch
from torch import nn

import curvature_engine as engine

torch.set_num_threads(1)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(50)), nn.Linear(50, 3)

    def forward(self, x):
        h = (x * self.scale).repeat(1, 3200)
        for _ in range(24):  # 41 MB each for 64 samples
            h = torch.relu(h + 0.01)
        return self.out(h.view(x.shape[0], 3200, 50).mean(1))


program = engine.load(torch.jit.script(Wide().eval()))
x, targets = torch.rand(64, 50), torch.randint(0, 3, (64,))
small = engine.analyze(program, x, targets, ["variance"], budget_bytes=2**28)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 800 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
result = engine.analyze(program, x, targets, ["variance"], budget_bytes=2**50)  # which promises too much
for name, value in small["variance"].items():
    torch.testing.assert_close(result["variance"][name], value, rtol=1e-3, atol=1e-10)
print(result.plan.chunks, *result.warnings)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep limits of address space")
def test_a_process_without_memory_goes_on(tmp_path):
    script = tmp_path / "wide.py"
    script.write_text(WIDE)
    run = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(("2 ", "4 ", "8 "))
    assert "began again" in run.stdout


def test_one_sample_that_does_not_fit_is_refused(monkeypatch):
    program, inputs, targets = setup()
    monkeypatch.setattr(BackwardPasses, "_column", failing(BackwardPasses._column, lambda c, shares: True))
    with pytest.raises(engine.EngineError) as refused:
        engine.analyze(program, inputs, targets, REQUESTS)
    assert refused.value.code == "out_of_memory"


def test_a_whole_batch_that_cannot_be_divided_gets_smaller_blocks(monkeypatch):
    program, inputs, targets = setup()
    original, sizes = ClosedForm.squared_norms, []

    def fails_once(self):
        sizes.append(self.block)
        if len(sizes) == 1:
            raise RuntimeError(NO_MEMORY)
        return original(self)

    monkeypatch.setattr(ClosedForm, "squared_norms", fails_once)
    result = engine.analyze(program, inputs, targets, ["batch_dot", "batch_l2"])
    assert any("began again" in warning for warning in result.warnings)
    for name, products in result["batch_dot"].items():
        torch.testing.assert_close(products.diagonal(), result["batch_l2"][name])


def test_files_of_a_failed_attempt_are_written_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(engine.planner, "LEAST_FILE_BYTES", 1)
    program, inputs, targets = setup()
    whole = engine.analyze(program, inputs, targets, ["batch_grad"])
    calls, original = [], BackwardPasses._column

    def fails_late(self, *arguments):
        calls.append(1)
        original(self, *arguments)
        if len(calls) == 1:
            raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(BackwardPasses, "_column", fails_late)
    result = engine.analyze(program, inputs, targets, ["batch_grad"], budget_bytes=1, results_dir=tmp_path)
    for name, gradient in whole["batch_grad"].items():
        torch.testing.assert_close(result["batch_grad"][name], gradient, rtol=1e-12, atol=1e-15)


def test_other_errors_are_not_mistaken_for_it(monkeypatch):
    program, inputs, targets = setup()

    def fail(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(BackwardPasses, "_column", fail)
    with pytest.raises(RuntimeError, match="something else"):
        engine.analyze(program, inputs, targets, REQUESTS)


def test_the_columns_may_be_many():
    """One column at a time: what is held does not grow with the classes."""
    peaks = []
    for classes in (10, 1000):
        module = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, classes))
        x, targets = torch.randn(4, 20), torch.randint(0, classes, (4,))
        plan = engine.plan(torch.jit.script(module), x, targets, ["diag_ggn_exact"])
        assert plan.columns["exact"] == classes - 1
        peaks.append(plan.peak_bytes / sum(p.numel() for p in module.parameters()))
    assert peaks[1] < 2 * peaks[0]
