"""Results that exceed the budget go to files as they are made, and are the same bits."""

import gc
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.models import build, targets_for
from tests.engine.test_table import BY_NAME
from torch import nn

import curvature_engine as engine
from curvature_engine import planner
from curvature_engine.stores import FileSlab, MemorySlab, ResultStore, lay_out

STREAMED = [
    *("batch_grad", "batch_diag_ggn_exact", "sqrt_ggn_exact", "batch_diag_hessian"),
    {"name": "batch_diag_ggn_mc", "options": {"mc_samples": 3}},
    {"name": "sqrt_ggn_mc", "options": {"mc_samples": 3}},
    {"name": "batch_grad", "label": "some", "options": {"subsampling": [3, 0, 3], "scale": "sample"}},
]
BESIDE = ["grad", "batch_l2", "variance", "kflr"]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(planner, "LEAST_FILE_BYTES", 1)


def setup(name):
    module, inputs = build(BY_NAME[name])
    return engine.load(torch.jit.script(module)), inputs, targets_for(module(*inputs), "cross_entropy")


@pytest.mark.parametrize("name", ["two_inputs", "tied_embedding", "lstm", "frozen_parameter"])
def test_files_hold_the_same_bits(name, tmp_path, monkeypatch):
    program, inputs, targets = setup(name)
    other, *_ = setup(name)  # a program keeps its plans
    for key, parameter in program.parameters.items():
        assert torch.equal(other.parameters[key].tensor, parameter.tensor)
    requests = [*STREAMED, *BESIDE]
    # The same chunks and blocks, with and without files.
    monkeypatch.setattr(planner, "LEAST_FILE_BYTES", 2**62)
    memory = engine.analyze(program, inputs, targets, requests, budget_bytes=1)
    monkeypatch.setattr(planner, "LEAST_FILE_BYTES", 1)
    files = engine.analyze(other, inputs, targets, requests, budget_bytes=1, results_dir=tmp_path)
    assert memory.plan.streamed == ()
    assert len(files.plan.streamed) == len(STREAMED)
    assert {p.name for p in tmp_path.iterdir()} == {f"{label}.safetensors" for label in files.plan.streamed}
    for label, group in memory.groups.items():
        stored = load_file(tmp_path / f"{label}.safetensors") if label in files.plan.streamed else None
        assert list(files.groups[label].tensors) == list(group.tensors)
        for key, provenance in files.groups[label].provenance.items():
            assert {**provenance, "verification": None} == {**group.provenance[key], "verification": None}
        for key, tensor in group.tensors.items():
            assert torch.equal(files.groups[label].tensors[key], tensor), (label, key)
            assert stored is None or torch.equal(stored[key], tensor)


def test_without_a_folder_the_files_have_no_names(monkeypatch):
    program, inputs, targets = setup("two_inputs")
    before = set(Path(tempfile.gettempdir()).glob("curvature-*"))
    result = engine.analyze(program, inputs, targets, ["batch_grad"], budget_bytes=1)
    assert any("batch_grad" in w and "results_dir" in w for w in result.warnings)
    assert set(Path(tempfile.gettempdir()).glob("curvature-*")) == before
    whole = engine.analyze(program, inputs, targets, ["batch_grad"])
    for name, gradient in whole["batch_grad"].items():
        torch.testing.assert_close(result["batch_grad"][name], gradient, rtol=1e-12, atol=1e-15)


def test_what_fails_on_the_way_leaves_no_file(tmp_path, monkeypatch):
    program, inputs, targets = setup("two_inputs")

    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(FileSlab, "write", fail)
    with pytest.raises(RuntimeError, match="broken"):
        engine.analyze(program, inputs, targets, ["batch_grad"], budget_bytes=1, results_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    program, inputs, targets = setup("two_inputs")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(engine.analysis.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(engine.EngineError, match="are free") as refused:
        engine.analyze(program, inputs, targets, ["batch_grad"], budget_bytes=1, results_dir=tmp_path)
    assert refused.value.code == "unavailable"


def test_an_edit_of_a_result_does_not_reach_the_file(tmp_path):
    program, inputs, targets = setup("two_inputs")
    result = engine.analyze(program, inputs, targets, ["batch_grad"], budget_bytes=1, results_dir=tmp_path)
    name = next(iter(result["batch_grad"]))
    before = load_file(tmp_path / "batch_grad.safetensors")[name]
    result["batch_grad"][name].zero_()
    assert torch.equal(load_file(tmp_path / "batch_grad.safetensors")[name], before)


@pytest.mark.parametrize("rows", [[0, 1, 2], [4, 2, 3], [1, 5, 0]])
def test_slabs_in_memory_and_in_files_are_alike(tmp_path, rows):
    layout = {"a": ((2, 3, 4), torch.float64), "b": ((6,), torch.float32)}
    store = ResultStore(tmp_path, {"group": layout})
    block, device = torch.randn(3, 4, dtype=torch.float64), torch.device("cpu")
    slabs = [
        MemorySlab((2, 3, 4), 2, torch.float64, device),
        store.slab("group", "a", (2, 3, 4), 2, torch.float64, device),
    ]
    for slab in slabs:
        slab.write(rows, block)
        slab.update(rows[1:], lambda found: found.mul_(2))
    store.close()
    assert torch.equal(store.files["group"]["a"], slabs[0].result())
    assert torch.equal(load_file(tmp_path / "group.safetensors")["a"], slabs[0].result())
    assert not bool(store.files["group"]["b"].any())


def test_every_tensor_is_aligned():
    layout = {"narrow": ((3,), torch.float32), "wide": ((5,), torch.float64), "odd name ü": ((1,), torch.float32)}
    header, places = lay_out(layout)
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length
    assert set(json.loads(header[8:])) == set(layout)
    for place in places.values():
        assert place.start % place.dtype.itemsize == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
def test_a_streamed_result_takes_no_memory(tmp_path):
    module = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 10))
    x, targets = torch.randn(32, 1000), torch.randint(0, 10, (32,))
    script = torch.jit.script(module)
    engine.analyze(script, x, targets, ["batch_grad"], budget_bytes=64 * 2**20, results_dir=tmp_path)
    gc.collect()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    peak, before = [], resident()
    engine.analyze(
        script,
        x,
        targets,
        [{"name": "sqrt_ggn_mc", "options": {"mc_samples": 3}}],
        budget_bytes=64 * 2**20,
        results_dir=tmp_path,
        progress=lambda done, total: peak.append(resident()),
    )
    assert (tmp_path / "sqrt_ggn_mc.safetensors").stat().st_size > 384 * 10**6
    assert max(peak) - before < 64 * 2**20
