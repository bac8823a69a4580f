"""Memory of large results, kept for the next one: never taken too early, never in the way."""

import gc
import mmap
import os
import sys
import threading

import pytest
import torch
from tests.engine.test_ownership import check_disjoint, memories, results_of
from torch import nn

import curvature_engine as engine
from curvature_engine import pages
from curvature_engine.closed_form import ClosedForm
from curvature_engine.pages import PAGES, room, with_room
from curvature_engine.stores import MemorySlab

MIB = 2**20
CPU = torch.device("cpu")
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
waits = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system cannot take marked pages back")


@pytest.fixture(autouse=True)
def _none_waits():
    gc.collect()
    PAGES.drop()
    PAGES.allow(256 * MIB)
    yield
    PAGES.drop()


def large(value=7.0, rows=4):
    tensor, clear = room((rows, MIB), torch.float32, rows * 4 * MIB)
    if clear:
        assert not bool(tensor.any())
    return tensor.fill_(value)


HOLDERS = {
    "a view": lambda t: t[1:2, :3],
    "a part detached": lambda t: t.view(-1)[5:].detach(),
    "an array": lambda t: t.numpy(),
    "a part of an array": lambda t: t.numpy()[2:, 1:5],
    "the storage": lambda t: t.untyped_storage(),
    "a capsule": torch.utils.dlpack.to_dlpack,
    "a tensor of a capsule": lambda t: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t)),
    "another type": lambda t: t.view(torch.int32),
    "a buffer": lambda t: memoryview(t.numpy()),
    "a graph": lambda t: (t * nn.Parameter(torch.ones(MIB))).sum(),
    "a parameter": lambda t: nn.Parameter(t),
}


@waits
@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_comes_back_with_its_last_holder(holder):
    tensor = large()
    place = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    gc.collect()
    assert PAGES.idle_bytes == 0
    other = large(8.0)
    assert other.data_ptr() != place
    del other, held
    gc.collect()
    assert PAGES.idle_bytes == 32 * MIB


@waits
def test_what_fits_is_used_again():
    first = large(rows=10)
    place = first.data_ptr()
    del first
    small = large(rows=4)  # would leave more than a quarter unused
    assert small.data_ptr() != place
    PAGES.drop()
    first = large(rows=10)
    place = first.data_ptr()
    del first
    nearly, clear = room((9, MIB), torch.float32, 36 * MIB)
    assert nearly.data_ptr() == place
    assert not clear


@waits
def test_no_more_waits_than_is_allowed():
    tensors = [large() for _ in range(5)]
    PAGES.allow(40 * MIB)
    del tensors
    assert PAGES.idle_bytes == 32 * MIB
    PAGES.allow(20 * MIB)
    assert PAGES.idle_bytes == 16 * MIB
    assert PAGES.drop() == 16 * MIB
    assert PAGES.drop() == 0


@waits
def test_what_is_new_takes_the_place_of_what_waits():
    first, second = large(rows=4), large(rows=8)
    del first, second
    assert PAGES.idle_bytes == 48 * MIB
    third = large(rows=2)  # 8 MiB: the first, which came back first, goes
    assert PAGES.idle_bytes == 32 * MIB
    assert third.nbytes == 8 * MIB


@waits
def test_where_a_mapping_is_refused_what_waits_is_dropped(monkeypatch):
    waiting = [large(rows=8), large(rows=8)]
    del waiting
    map_, refused, exhausted = pages._map, [], False

    def scarce(size):
        if PAGES.idle_bytes or exhausted:
            refused.append(size)
            raise OSError("Cannot allocate memory")
        return map_(size)

    monkeypatch.setattr(pages, "_map", scarce)
    found = large(rows=4)
    assert refused == [16 * MIB]
    assert PAGES.idle_bytes == 0
    exhausted = True
    with pytest.raises(MemoryError, match="no memory for"):
        large(rows=16)
    assert bool((found == 7).all())


@waits
def test_threads_never_share_a_mapping():
    failures = []

    def work(value):
        for _ in range(30):
            tensor = large(value, rows=2)
            if not bool((tensor == value).all()):
                failures.append(value)
            del tensor

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failures
    assert PAGES.idle_bytes <= 4 * 8 * MIB


@waits
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own():
    held, waiting = large(3.0), large(4.0)
    del waiting
    child = os.fork()
    if child == 0:
        mine = large(5.0)
        held.fill_(6.0)
        del held
        os._exit(0 if PAGES.idle_bytes == 16 * MIB and bool((mine == 5).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((held == 3).all())
    assert bool((large(9.0) == 9).all())


@waits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_nobody_wrote_are_zero(dtype):
    shape = (6, 2**19, 2)
    slab = MemorySlab(shape, 1, dtype, CPU)
    place = slab.result().data_ptr()
    slab.write(range(6), torch.full(shape, 9.0, dtype=dtype))
    del slab
    slab = MemorySlab(shape, 1, dtype, CPU)
    slab.write([2], torch.ones(1, *shape[1:], dtype=dtype))
    slab.place([3]).fill_(2)
    slab.update([1, 2], lambda rows: rows.add_(5))
    slab.update([5, 0], lambda rows: rows.add_(6))
    found = slab.result()
    assert found.data_ptr() == place
    expected = torch.tensor([6.0, 5.0, 6.0, 2.0, 0.0, 6.0], dtype=dtype)
    assert torch.equal(found, expected.view(6, 1, 1).expand(shape))


def test_small_slabs_are_zero_as_well(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda shape, **more: torch.full(shape, float("nan"), **more))
    slab = MemorySlab((2, 3, 2), 2, torch.float64, CPU)
    slab.write([4], torch.ones(1, 2, dtype=torch.float64))
    slab.update([1, 0], lambda rows: rows.add_(5))
    expected = torch.tensor([5.0, 5.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(slab.result().view(6, 2), expected[:, None].expand(6, 2))


ROWS = [
    *("batch_grad", "batch_diag_ggn_exact", "batch_diag_hessian", "sqrt_ggn_exact"),
    {"name": "batch_diag_ggn_mc", "options": {"mc_samples": 3}},
    {"name": "sqrt_ggn_mc", "options": {"mc_samples": 3}},
    {"name": "batch_grad", "label": "some", "options": {"subsampling": [3, 0, 3], "scale": "sample"}},
]
SUMS = [
    *("sum_grad_squared", "variance", "diag_ggn_exact", "diag_ggn_mc", "kflr"),
    *({"name": "kfac", "label": form, "options": {"approximation": form}} for form in ("reduce", "backpack")),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.a, self.b = nn.Conv2d(2, 3, 3), nn.Linear(48, 7), nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(torch.tanh(self.c(x)).flatten(1))))


@waits
@pytest.mark.parametrize("budget_bytes", [None, 1])
@pytest.mark.parametrize("requests", [ROWS, SUMS], ids=["rows", "sums"])
def test_results_in_used_memory_are_the_same_bits(monkeypatch, requests, budget_bytes):
    """What stood in the memory before, here NaN, shows in no result, however the batch is divided."""
    program = engine.load(torch.jit.script(Net().double()))
    x, targets = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    monkeypatch.setattr(engine.planner, "LEAST_FILE_BYTES", 2**62)
    options = {"parameters": "all", "budget_bytes": budget_bytes}
    expected = engine.analyze(program, x, targets, requests, **options)
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)
    monkeypatch.setattr(engine.analysis, "_leave_room", lambda plan: None)
    monkeypatch.setattr(engine.budget.Budget, "idle_bytes", 512 * MIB)
    engine.analyze(program, x, targets, requests, **options)
    taken = {torch.frombuffer(each, dtype=torch.float64).fill_(float("nan")).data_ptr() for each in PAGES._idle}
    found = engine.analyze(program, x, targets, requests, **options)
    assert {t.data_ptr() for _, t in results_of(found)} & taken
    check_disjoint(memories(results_of(found)))
    for (name, tensor), (_, other) in zip(results_of(found), results_of(expected), strict=True):
        assert torch.equal(tensor, other), name


@waits
def test_nothing_is_made_smaller_for_what_waits(monkeypatch):
    program = engine.load(torch.jit.script(Net()))
    x, targets = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
    whole = engine.analyze(program, x, targets, ["batch_grad", "variance"])
    waiting = large()
    del waiting
    original, tried = engine.passes.BackwardPasses._column, []

    def scarce(self, *arguments):
        tried.append(PAGES.idle_bytes)
        if PAGES.idle_bytes:
            raise RuntimeError(NO_MEMORY)
        original(self, *arguments)

    monkeypatch.setattr(engine.passes.BackwardPasses, "_column", scarce)
    found = engine.analyze(program, x, targets, ["batch_grad", "variance"])
    assert tried == [16 * MIB, 0]
    assert found.warnings == whole.warnings
    assert found.plan == whole.plan


@waits
def test_no_block_is_halved_for_what_waits(monkeypatch):
    program = engine.load(torch.jit.script(Net()))
    x, targets = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
    waiting = large()
    del waiting
    original = ClosedForm.gradients

    def scarce(self, block):
        if PAGES.idle_bytes:
            raise RuntimeError(NO_MEMORY)
        return original(self, block)

    monkeypatch.setattr(ClosedForm, "gradients", scarce)
    found = engine.analyze(program, x, targets, ["batch_grad"])
    assert PAGES.idle_bytes == 0
    assert not any("halved" in warning for warning in found.warnings)


@waits
def test_what_the_plan_needs_comes_first():
    program = engine.load(torch.jit.script(Net()))
    x, targets = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
    plan = engine.plan(program, x, targets, ["variance"])
    waiting = [large(rows=3), large(rows=3), large(rows=3)]
    budget = 4 * 28 * MIB  # a quarter of it may wait at all
    del waiting
    assert PAGES.idle_bytes == 36 * MIB
    engine.analyze(program, x, targets, ["variance"], budget_bytes=budget)
    assert PAGES.idle_bytes == 24 * MIB
    engine.analysis._leave_room(engine.analysis.replace(plan, budget_bytes=plan.peak_bytes + 15 * MIB))
    assert PAGES.idle_bytes == 12 * MIB


@waits
def test_another_try_after_what_waits_was_dropped():
    waiting = large()
    del waiting

    def scarce():
        if PAGES.idle_bytes:
            raise RuntimeError(NO_MEMORY)
        return 3

    assert with_room(scarce) == 3
    with pytest.raises(RuntimeError, match="another"):
        with_room(lambda: (_ for _ in ()).throw(RuntimeError("another")))


@waits
def test_an_analysis_uses_the_memory_of_the_last():
    module = nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 5))
    program, x, targets = engine.load(torch.jit.script(module)), torch.randn(40, 400), torch.randint(0, 5, (40,))
    place, expected = -1, None
    for _ in range(3):
        gradient = engine.analyze(program, x, targets, ["batch_grad"])["batch_grad"]["0.weight"]
        assert place in (-1, gradient.data_ptr())
        assert expected is None or torch.equal(gradient, expected)
        place, expected = gradient.data_ptr(), gradient.clone()
        gradient.fill_(float("nan"))
        del gradient
