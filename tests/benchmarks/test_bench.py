"""The benchmark against peers, on two nets with tiny batches: it compares before it times, and tells both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKS = ["batch_l2", "variance", "diag_ggn_mc", "kfac", "kfac-expand", "kfra"]
PARAMETERS = {"2c2d": 3_274_634, "3c3d": 895_210, "allcnnc": 1_387_108}


def run(program, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    output, plots = folder / "bench.json", folder / "plots"
    options = ["--quick", "--output", str(output), "--plots", str(plots), "--nets", "3c3d", "mlp"]
    done = run(["-m", "benchmarks.bench"], *options, "--extensions", *WORKS)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout, sorted(path.name for path in plots.iterdir())


def test_peers_are_compared_and_timed(report):
    cells = {(cell["net"], cell["work"]): cell for cell in report[0]["cells"]}
    assert cells.keys() == {("3c3d", work) for work in WORKS if work != "kfra"} | {("mlp", "kfra")}
    for (_, work), cell in cells.items():
        peer = "curvlinops" if work == "kfac-expand" else "backpack"
        assert cell["ratios"][peer] > 0
        assert cell["errors"].keys() == cell["ratios"].keys()
        assert max(cell["errors"].values()) < 1e-3
        assert set(cell["rounds"].values()) == {1}


def test_report_names_floors_ratios_and_who_could_not(report):
    found, text, plots = report
    assert next(c for c in found["cells"] if c["work"] == "diag_ggn_mc")["floors"] == {"floor": pytest.approx(1.0)}
    assert "BackPACK's time / ours" in text
    assert "Opacus has individual gradients and their norms" in text
    assert plots == ["overhead_3c3d.png", "overhead_mlp.png"]


def test_nets_are_those_of_the_papers():
    program = "from benchmarks.bench.nets import parameters_of; import json, sys;"
    done = run(["-c", program + "print(json.dumps({n: parameters_of(n) for n in sys.argv[1:]}))", *PARAMETERS])
    assert json.loads(done.stdout) == PARAMETERS


def test_every_extension_is_among_the_works():
    program = "from benchmarks.bench.works import EXTENSIONS, WORKS; print(sorted(EXTENSIONS.keys() - WORKS.keys()))"
    assert run(["-c", program]).stdout.strip() == "[]"


def test_a_wrong_result_is_not_timed():
    program = """
import torch
from benchmarks.bench import cells
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.jobs import Job
from benchmarks.bench.timing import Effort
from benchmarks.bench.works import WORKS

def doubled(case, work):
    job = right(case, work)
    return Job(job.run, lambda found: {n: {k: 2 * t for k, t in v.items()} for n, v in job.read(found).items()})

right = cells.PEERS["naive"]
cells.PEERS["naive"] = doubled
case = Case("mlp", 2, 10, Place(torch.device("cpu"), torch.float32))
cell = cells.measure(case, WORKS["batch_grad"], ["naive", "functional"], Effort(1, 1.0), 1e9)
print(sorted(cell.wrong), sorted(cell.ratios))
"""
    assert run(["-c", program]).stdout.strip() == "['naive'] ['functional']"


def test_growth_is_a_straight_line_and_how_far_off_times_are():
    program = "from benchmarks.bench.growth import Line; import dataclasses, json, sys;"
    program += "print(json.dumps(dataclasses.astuple(Line.through(json.loads(sys.argv[1])))))"
    done = run(["-c", program, json.dumps([[1, 3], [2, 5], [4, 9]])])
    assert json.loads(done.stdout) == pytest.approx([1, 2, 0], abs=1e-12)
    start, slope, deviation = json.loads(run(["-c", program, json.dumps([[8, 1], [32, 4], [128, 20]])]).stdout)
    assert slope > 0
    assert deviation == pytest.approx(max(abs(start + slope * x - y) / y for x, y in ((8, 1), (32, 4), (128, 20))))
    assert 0.01 < deviation < 0.5


def test_who_differs_by_more_than_rounding_is_asked_again_in_float64():
    program = """
import json, torch
from benchmarks.bench import cells, equality
from benchmarks.bench.cases import Case, Place
from benchmarks.bench.works import WORKS
case = Case("3c3d", 2, 10, Place(torch.device("cpu"), torch.float32))
found = [cells._error_in_float64("backpack", case, WORKS["batch_grad"])]
equality.TOLERANCES[torch.float64] = 0.0
found.append(cells._error_in_float64("backpack", case, WORKS["batch_grad"]))
print(json.dumps([*found, torch.get_default_dtype() == torch.float32]))
"""
    agreed, refused, restored = json.loads(run(["-c", program]).stdout)
    assert 0 < agreed < 1e-13
    assert refused is None
    assert restored
