"""The `curvature` command, as a shell runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.integration.cases import small

CURVATURE = str(Path(sys.executable).with_name("curvature"))


@pytest.fixture
def run(server, tmp_path):
    model, (x, y) = small()
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    safetensors.torch.save_file({"inputs": x, "targets": y}, tmp_path / "batch.safetensors")

    def run(*words, url=server.url):
        environment = {**os.environ, "CURVATURE_URL": url}
        return subprocess.run(
            [CURVATURE, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def test_analyze_writes_the_tensors(run, tmp_path):
    done = run("analyze", "model.pt", "batch.safetensors", "-e", "diag_ggn_mc", "-e", "kfac", "-o", "out.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "(cross_entropy with label_smoothing=0.0, ignore_index=-100, mean)" in done.stdout
    assert "wrote out.safetensors" in done.stdout
    assert set(safetensors.torch.load_file(tmp_path / "out.safetensors")) >= {"diag_ggn_mc/0.weight", "kfac/0.weight/A"}


def test_options_go_to_the_extensions_that_know_them(run, tmp_path):
    words = ["analyze", "model.pt", "batch.safetensors", "-e", "variance", "-e", "kfac", "-o", "out.safetensors"]
    assert (
        run(
            *words,
            "--mc-samples",
            "4",
            "--loss",
            "cross_entropy",
            "--reduction",
            "sum",
            "--verify",
            "--precision",
            "float32",
        ).returncode
        == 0
    )
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        manifest = json.loads(file.metadata()["curvature_manifest"])
    assert [g["options"].get("mc_samples") for g in manifest["groups"]] == [None, 4]
    assert manifest["reduction"] == "sum"
    verified = {t["provenance"]["verification"] for g in manifest["groups"] for t in g["tensors"]}
    assert verified == {"this job, every column"}


def test_jobs_can_be_listed_shown_saved(run, tmp_path):
    run("analyze", "model.pt", "batch.safetensors", "-e", "grad", "-o", "out.safetensors")
    listed = run("jobs", "--limit", "1").stdout.splitlines()
    assert listed[0].split() == ["JOB", "STATUS", "CREATED", "TOOK", "EXTENSIONS"]
    job_id, status = listed[1].split()[:2]
    assert status == "succeeded"
    assert "succeeded" in run("jobs", "show", job_id).stdout
    assert run("jobs", "save", job_id, "-o", "again.safetensors").returncode == 0
    first, second = (safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in ("out", "again"))
    assert torch.equal(first["grad/0.weight"], second["grad/0.weight"])
    refused = run("jobs", "cancel", job_id)
    assert refused.returncode == 1
    assert "has succeeded already" in refused.stderr


@pytest.fixture
def parts(run, tmp_path):
    _, (x, y) = small()
    for name, rows in (("part0", slice(0, 4)), ("part1", slice(4, 6))):
        batch = {"inputs": x[rows].contiguous(), "targets": y[rows].contiguous()}
        safetensors.torch.save_file(batch, tmp_path / f"{name}.safetensors")
    return ["part0.safetensors", "part1.safetensors"]


def test_several_files_are_a_data_set(run, parts, tmp_path):
    words = ["-e", "batch_grad", "-e", "grad", "--priority", "7", "--no-cache"]
    done = run("analyze", "model.pt", *parts, *words, "-o", "parts.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean; 6 samples in 2 parts)" in done.stdout
    assert "from the cache" not in done.stdout
    assert run("analyze", "model.pt", "batch.safetensors", *words, "-o", "one.safetensors").returncode == 0
    ours, theirs = (safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in ("parts", "one"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    job_id = run("jobs").stdout.splitlines()[2].split()[0]
    shown = run("jobs", "show", job_id).stdout
    assert re.search(r"^batch +2 parts, 6 samples$", shown, re.MULTILINE)


def test_what_came_from_the_cache_is_said(run):
    words = ["analyze", "model.pt", "batch.safetensors", "-e", "batch_l2", "-o", "out.safetensors"]
    run(*words)
    assert re.search(r"^from the cache: batch_l2 \(job [0-9a-f]{32}\)$", run(*words).stdout, re.MULTILINE)


def test_a_data_set_that_waits_says_how_many_shards_are_there(run, parts):
    words = ["-e", "saliency", "--tag", "nowhere", "--timeout", "0.5", "-o", "out.safetensors"]
    done = run("analyze", "model.pt", *parts, *words)
    assert done.returncode == 1
    job_id = re.search(r"jobs show ([0-9a-f]{32})", done.stderr)[1]
    assert [line.split()[1:3] for line in run("jobs").stdout.splitlines() if job_id in line] == [["waiting", "0/2"]]
    assert re.search(r"^status +waiting 0/2$", run("jobs", "show", job_id).stdout, re.MULTILINE)
    assert run("jobs", "retry", job_id).returncode == 1
    assert run("jobs", "cancel", job_id).stdout == "cancelled\n"
    assert run("jobs", "retry", job_id).stdout == "waiting 0/2\n"
    assert run("jobs", "cancel", job_id).stdout == "cancelled\n"


def test_extensions_are_listed(run):
    text = run("extensions").stdout
    assert "diag_ggn_mc" in text
    assert "losses: cross_entropy, mse" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyze", "model.pt", "batch.safetensors", "-e", "kfacs", "-o", "x"], "did you mean 'kfac'"),
        (["analyze", "absent.pt", "batch.safetensors", "-e", "kfac", "-o", "x"], "absent.pt does not exist"),
        (["analyze", "batch.safetensors", "batch.safetensors", "-e", "kfac", "-o", "x"], "no TorchScript archive"),
        (
            ["analyze", "model.pt", "batch.safetensors", "-e", "kfac", "-o", "/no/such/folder/x"],
            "lies in a folder that does not exist",
        ),
        (["jobs", "show", "nothing"], "there is no job 'nothing'"),
    ],
)
def test_errors_are_one_line_and_status_one(run, words, message):
    done = run(*words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_not_there(run):
    done = run("jobs", url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "curvature serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_server_on_one_data_folder_is_refused(server, run):
    done = run("serve", "--port", "0", "--data-dir", str(server.data_dir))
    assert done.returncode == 1
    assert "another server uses the data folder" in done.stderr


def test_a_port_in_use_is_refused(server, run, tmp_path):
    port = server.url.rpartition(":")[2]
    done = run("serve", "--port", port, "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    assert "choose another port" in done.stderr


def test_a_device_that_does_not_exist_is_refused(run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("serve", "--port", "0", "--data-dir", str(tmp_path / "data"), "--device", "cuda")
    assert done.returncode == 1
    assert "sees 0 CUDA devices" in done.stderr


def test_plan_shows_a_table(run):
    done = run("plan", "model.pt", "batch.safetensors", "-e", "batch_grad", "-e", "kfac")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("6 samples in one chunk, float32 on cpu; columns: 1 gradient, 1 sampled")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows if row and row[0] == "kfac"] == [
        ["kfac", name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]


def test_inspect_shows_a_table(run):
    done = run("inspect", "model.pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torchscript; inputs: input")
    assert "operators: linear ×2, relu ×1" in done.stdout
    assert re.search(r"^0\.weight +4×5 +float32 +linear", done.stdout, re.MULTILINE)


def test_inspect_says_what_is_wrong_with_a_file(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    done = run("inspect", "model.pt")
    assert done.returncode == 1
    assert "no TorchScript archive" in done.stderr
