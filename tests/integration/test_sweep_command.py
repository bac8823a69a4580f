"""`curvature sweep` and `curvature sweeps`, as a shell runs them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.integration.cases import small
from torch import nn

CURVATURE = str(Path(sys.executable).with_name("curvature"))
GRID = """
extensions: [variance]
grid:
  model: {small: models/net.pt, linear: models/linear.pt}
  batch: [good.safetensors, bad.safetensors]
  seed: 0..1
"""


@pytest.fixture
def folder(tmp_path):
    net, (x, y) = small()
    (tmp_path / "work" / "models").mkdir(parents=True)
    torch.jit.save(torch.jit.script(net), tmp_path / "work" / "models" / "net.pt")
    torch.jit.save(torch.jit.script(nn.Linear(5, 3).eval()), tmp_path / "work" / "models" / "linear.pt")
    safetensors.torch.save_file({"inputs": x, "targets": y}, tmp_path / "work" / "good.safetensors")
    safetensors.torch.save_file({"inputs": x, "targets": y + 7}, tmp_path / "work" / "bad.safetensors")
    return tmp_path


@pytest.fixture
def run(server, folder):
    def run(*words):
        environment = {**os.environ, "CURVATURE_URL": server.url}
        return subprocess.run(
            [CURVATURE, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def write(folder, text):
    (folder / "work" / "sweep.yaml").write_text(text)
    return "work/sweep.yaml"


def test_a_sweep_is_run_saved_and_reported(run, folder):
    done = run("sweep", write(folder, GRID), "--output", "results")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(": 8 rows")
    assert {tuple(line.split()) for line in lines[1:4]} == {("STATE", "JOBS"), ("succeeded", "4"), ("failed", "4")}
    assert lines[5].split()[:4] == ["ROW", "MODEL", "BATCH", "SEED"]
    assert lines[6].startswith("2    small   bad.safetensors  0     class indices must lie in 0 … 2")
    saved = sorted(path.name for path in (folder / "results").iterdir())
    assert saved == ["00000.safetensors", "00001.safetensors", "00004.safetensors", "00005.safetensors", "rows.csv"]
    assert "variance/0.weight" in safetensors.torch.load_file(folder / "results" / "00000.safetensors")
    with (folder / "results" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["model"], row["batch"], row["seed"], row["status"]) for row in rows[2:5]] == [
        ("2", "small", "bad.safetensors", "0", "failed"),
        ("3", "small", "bad.safetensors", "1", "failed"),
        ("4", "linear", "good.safetensors", "0", "succeeded"),
    ]
    assert float(rows[0]["loss_value"]) > 0


def test_success_alone_is_status_zero(run, folder):
    done = run("sweep", write(folder, GRID.replace(", bad.safetensors", "")))
    assert (done.returncode, done.stderr) == (0, "")
    assert "succeeded  4" in done.stdout


def test_a_sweep_can_be_left_listed_shown_waited_for_and_taken_up_again(run, folder):
    left = run("sweep", write(folder, GRID), "--no-wait")
    assert left.returncode == 0
    sweep_id = left.stdout.split()[1].rstrip(":")
    waited = run("sweeps", "wait", sweep_id)
    assert waited.returncode == 1
    assert "class indices" in waited.stdout
    listed = run("sweeps", "--limit", "1").stdout.splitlines()
    assert listed[0].split() == ["SWEEP", "CREATED", "ROWS", "AXES", "STATES"]
    assert listed[1].startswith(sweep_id)
    assert "model, batch, seed" in listed[1]
    assert {"4 succeeded", "4 failed"} <= set(listed[1].split("  ")[-1].split(", "))
    assert run("sweeps", "show", sweep_id).stdout == waited.stdout
    assert "4 queued" in run("sweeps", "retry", sweep_id).stdout
    assert run("sweeps", "cancel", sweep_id).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("net.pt", "absent.pt"), "grid.model.0: work/models/absent.pt does not exist"),
        (GRID.replace("variance", "variants"), "did you mean 'variance'"),
        (GRID.replace("grid:", "gird:"), "work/sweep.yaml: there is no field 'gird'; did you mean 'grid'"),
        (GRID + "  seed: [1]\n", "work/sweep.yaml: line 7, column 3: found duplicate key"),
        ("extensions: [grad]\n", "a sweep has either a grid or rows"),
    ],
)
def test_errors_are_one_line_and_status_one(run, folder, text, message):
    done = run("sweep", write(folder, text))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wait_that_is_too_short_says_how_to_look_again(run, folder):
    done = run("sweep", write(folder, GRID), "--timeout", "0")
    assert done.returncode == 1
    sweep_id = done.stdout.split()[1].rstrip(":")
    assert f"see `curvature sweeps show {sweep_id}`" in done.stderr
