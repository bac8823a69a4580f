"""The script for machines with a GPU: here it says that there is none; its sections run on the CPU, on small shapes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.bench.cases import Place

import curvature_engine as engine

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    done = run()
    assert (done.returncode, done.stdout) == (0, "no CUDA device here: nothing was checked\n")


def test_every_section_runs_and_finds_nothing_wrong(tmp_path):
    output = tmp_path / "gpu.json"
    sections = ["correctness", "kernels", "precision", "waits", "graphs", "busy"]
    done = run("--device", "cpu", "--quick", "--output", str(output), "--only", *sections)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert [*found] == ["machine", *sections]
    assert max(found["correctness"]["relative errors"]["3c3d"].values()) < 1e-4
    assert found["precision"]["3c3d"]["channels last"]["told"]["gradient"] < 1e-4
    assert found["precision"]["3c3d"]["tf32"].startswith("tf32 products do not exist")
    assert found["graphs"]["3c3d, N = 2"]["eager"] > 0
    assert found["busy"]["3c3d, N = 2"]["kfac"]["seconds"] > 0


@pytest.mark.parametrize("section", ["correctness", "busy"])
def test_a_net_that_fails_leaves_the_others_theirs(section, monkeypatch):
    module = importlib.import_module(f"benchmarks.gpu_checks.{section}")
    nets, analyze = module.NETS, engine.analyze
    monkeypatch.setattr(module, "NETS", {name: nets[name] for name in ("2c2d", "mlp")})
    monkeypatch.setattr(module, "NAMES", ("grad", "kfac"), raising=False)
    monkeypatch.setattr(module, "EXACT", (), raising=False)

    def failing(program, inputs, *rest, **options):
        if inputs.dim() == 4 and "kfac" in str(rest):
            raise RuntimeError("no such luck")
        return analyze(program, inputs, *rest, **options)

    monkeypatch.setattr(engine, "analyze", failing)
    found = getattr(module, section)(Place(torch.device("cpu"), torch.float32), False)
    tables = found.get("relative errors", found)
    by_net = {name.split(",")[0]: table for name, table in tables.items() if name != "wrong"}
    assert by_net["2c2d"]["kfac"] == "failed: RuntimeError: no such luck"
    assert not isinstance(by_net["2c2d"]["grad"], str)
    assert not isinstance(by_net["mlp"]["kfac"], str)
    assert found["wrong"] == ["2c2d kfac"]
