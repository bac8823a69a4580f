"""Plans and inspections: jobs that compute no tensors, through a real confined child."""

import pytest
import torch
from tests.worker import models
from tests.worker.desk import script

import curvature_engine as engine
from curvature_protocol.jobs import JobKind, JobStatus
from curvature_worker.errors import JobRefused
from curvature_worker.reports import read_report

pytestmark = pytest.mark.integration

EXTENSIONS = ["batch_grad", {"name": "kfac", "label": "factors", "options": {"mc_samples": 4}}]


def test_an_inspection_is_the_engines(desk, tmp_path):
    data = script(models.small())
    (tmp_path / "model").write_bytes(data)
    job = desk.run(desk.inspect(data))
    assert (job.status, job.kind) == (JobStatus.SUCCEEDED, JobKind.INSPECTION), job.error
    found, expected = desk.report(job), engine.inspect(tmp_path / "model").to_dict()
    assert found["parameters"][0]["shape"] == list(expected["parameters"][0]["shape"])
    assert [p["closed_form"] for p in found["parameters"]] == [list(p["closed_form"]) for p in expected["parameters"]]
    assert [p["name"] for p in found["parameters"]] == [p["name"] for p in expected["parameters"]]


def test_a_plan_is_the_engines(desk, tmp_path):
    data = script(models.small())
    (tmp_path / "model").write_bytes(data)
    job = desk.run(desk.submit(data, models.batch(), EXTENSIONS, kind=JobKind.PLAN))
    assert job.status == JobStatus.SUCCEEDED, job.error
    found = desk.report(job)
    inputs, targets = models.batch()
    expected = engine.plan(tmp_path / "model", inputs, targets, EXTENSIONS).to_dict()
    same = found.keys() & expected.keys() - {"budget_bytes", "block_bytes"}
    assert same >= {"N", "peak_bytes", "requests", "gradients", "columns"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert desk.results(job.id) == [f"results/{job.id}/{job.attempt}/plan.json"]


def test_a_model_that_is_refused_says_why(desk):
    job = desk.run(desk.inspect(b"no model at all"))
    assert job.status == JobStatus.FAILED
    assert job.error.code == "invalid_model"


def test_a_plan_of_what_the_model_rejects_fails_as_the_job_would(desk):
    batch = (torch.randn(6, 9), torch.randint(0, 3, (6,)))
    plan, job = (desk.run(desk.submit(models.small(), batch, kind=kind)) for kind in (JobKind.PLAN, JobKind.ANALYSIS))
    assert plan.status == JobStatus.FAILED
    assert plan.error == job.error


@pytest.mark.parametrize("report", [None, "text", {}, {"N": "many"}])
def test_a_report_that_is_none_is_refused(report):
    with pytest.raises(JobRefused) as caught:
        read_report(JobKind.PLAN, {"event": "done", "report": report})
    assert caught.value.code == "internal_error"
