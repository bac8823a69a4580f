"""Seeing before running, through a real server."""

import hashlib

import pytest
import torch
from tests.integration.cases import small
from torch import nn

import curvature_engine as engine
from curvature_client import JobFailed, NotFoundError, UnprocessableError


def test_a_plan_is_the_engines_and_reads_well(client):
    net, batch = small()
    jobs = len(client.jobs.list())
    plan = client.plan(net, batch, ["batch_grad", {"name": "kfac", "options": {"mc_samples": 3}}])
    expected = engine.plan(net, *batch, ["batch_grad", {"name": "kfac", "options": {"mc_samples": 3}}])
    assert plan.columns == expected.columns == {"gradient": 1, "exact": 0, "sampled": 3}
    assert [p.method for r in plan.requests for p in r.parameters] == ["closed form"] * 8
    assert plan.peak_bytes == expected.peak_bytes
    assert "6 samples in one chunk" in str(plan)
    assert len(client.jobs.list()) == jobs
    assert client.jobs.list(kind="plan")[0].status == "succeeded"


def test_a_plan_of_what_cannot_run_raises_what_the_job_would(client):
    net, (x, y) = small()
    with pytest.raises(UnprocessableError) as planned:
        client.plan(net, (x, y + 7), ["batch_grad"])
    with pytest.raises(UnprocessableError) as run:
        client.analyze(net, (x, y + 7), ["batch_grad"])
    assert isinstance(planned.value, JobFailed)
    assert (planned.value.code, str(planned.value)) == (run.value.code, str(run.value))


def test_a_model_is_inspected_once_by_file_module_or_hash(client, tmp_path):
    net, _ = small()
    torch.jit.save(torch.jit.script(net), tmp_path / "model.pt")
    first = client.inspect(tmp_path / "model.pt")
    count = len(client.jobs.list(kind="inspection"))
    again = client.inspect(hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest())
    assert first == again
    assert len(client.jobs.list(kind="inspection")) == count
    assert [p.name for p in client.inspect(net).parameters] == [name for name, _ in net.named_parameters()]


def test_an_inspection_says_what_no_parameter_of_a_norm_gets(client):
    found = client.inspect(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)).eval())
    norm, weight = found.parameters[0], found.parameters[2]
    assert norm.none["kfac"].startswith("no Kronecker form for layer_norm")
    assert "kfac" in weight.closed_form


def test_a_hash_that_nobody_uploaded_is_not_found(client):
    with pytest.raises(NotFoundError):
        client.inspect("0" * 64)


def test_an_exported_module_is_planned_and_inspected_as_the_scripted_one(client):
    net, batch = small()
    plans = [client.plan(net, batch, ["kflr", "variance"], format=way) for way in ("export", "script")]
    assert [[p.method for r in plan.requests for p in r.parameters] for plan in plans] == [["closed form"] * 8] * 2
    looks = [client.inspect(net, batch=batch, format=way) for way in ("export", "script")]
    assert [look.format for look in looks] == ["export", "torchscript"]
    assert [p.closed_form for p in looks[0].parameters] == [p.closed_form for p in looks[1].parameters]


def test_a_plan_says_where_its_peak_exceeds_the_budget(client):
    plan = client.plan(nn.Linear(2, 300_000), (torch.randn(2, 2), torch.tensor([0, 1])), ["kfac"])
    assert plan.peak_bytes > plan.budget_bytes
    assert "exceeds the budget" in str(plan)
