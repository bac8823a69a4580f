"""`verify=True`: judged anew, and every column's sums held against ordinary gradients."""

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from torch import nn

import curvature_engine as engine
from curvature_engine import contributions
from curvature_engine.rules.linear import LinearRule

COLUMNS = ["batch_grad", "diag_ggn_exact", {"name": "diag_ggn_mc", "options": {"mc_samples": 2}}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_sound_model_fails_and_no_number_changes(case, dtype):
    module, inputs = build(case)
    module = module.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    loss = case.losses[0]
    targets = targets_for(module(*inputs), loss)
    program = engine.load(torchscript(module, inputs, case.ways[0]))
    plain = engine.analyze(program, inputs, targets, COLUMNS, loss=loss)
    verified = engine.analyze(program, inputs, targets, COLUMNS, loss=loss, verify=True)
    for label, group in verified.groups.items():
        for key, tensor in group.tensors.items():
            assert torch.equal(tensor, plain.groups[label].tensors[key])
            assert group.provenance[key]["verified"]
            assert group.provenance[key]["verification"] == "this job, every column"


class Scaled(nn.Module):
    """One parameter with closed forms, one that falls back."""

    def __init__(self):
        super().__init__()
        self.layer, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return torch.logaddexp(self.layer(x), self.temperature)


@pytest.fixture
def job():
    program = engine.load(torch.jit.script(Scaled().double()))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])

    def run(**options):
        return engine.analyze(program, x, y, ["batch_grad", "diag_ggn_exact"], **options)

    run.program = program
    return run


def said(result, parameter, label="batch_grad"):
    return result.groups[label].provenance[parameter]["verification"]


def test_the_provenance_says_when_the_path_was_judged():
    program, y = engine.load(torch.jit.script(nn.Linear(4, 3))), torch.tensor([0, 1, 2, 0, 1])

    def job(verify):
        return engine.analyze(program, torch.randn(5, 4), y, ["batch_grad"], verify=verify)

    assert [said(job(verify), "weight") for verify in (False, False, True, False)] == [
        "this job",
        "kept verdict",
        "this job, every column",
        "kept verdict",
    ]


def test_only_what_is_made_of_compared_columns_alone_says_so():
    program, y = engine.load(torch.jit.script(nn.Linear(4, 3).double())), torch.tensor([0, 1, 2, 0, 1])
    x = torch.randn(5, 4, dtype=torch.float64)
    compared = ["variance", "diag_ggn_exact", "sqrt_ggn_mc", "kfac", "kflr"]
    others = ["diag_hessian", "batch_diag_hessian", "kfra", "grad", "batch_loss", "outputs"]
    result = engine.analyze(program, x, y, [*compared, *others], verify=True)
    for label in compared + others:
        found = {entry["verification"] for entry in result.groups[label].provenance.values()}
        assert found == {"this job, every column" if label in compared else "this job"}, label


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        if x.shape[0] > 5:
            return self.layer(x)
        return torch.relu(self.layer(x))


def test_another_batch_counts_by_when_it_was_judged():
    program = engine.load(torch.jit.script(Branching()))
    short, long = ((torch.randn(n, 4), torch.arange(n) % 3) for n in (5, 6))

    def job(batch, other):
        dot = {"name": "batch_dot", "options": {"against": other}}
        return said(engine.analyze(program, *batch, [dot]), "layer.weight", "batch_dot")

    assert job(short, short) == "this job"
    assert job(long, short) == "kept verdict"
    assert job(long, long) == "kept verdict"


def test_chunks_judged_in_this_job_say_so():
    program, y = engine.load(torch.jit.script(nn.Linear(4, 3))), torch.arange(8) % 3

    def job():
        return engine.analyze(program, torch.randn(8, 4), y, ["batch_grad"], budget_bytes=1)

    first, second = job(), job()
    assert first.plan.chunks > 1
    assert (said(first, "weight"), said(second, "weight")) == ("this job", "kept verdict")


def test_a_closed_form_that_went_wrong_since_fails_by_name(job, monkeypatch):
    job()
    right = LinearRule.per_sample
    monkeypatch.setattr(LinearRule, "per_sample", lambda *args: 1.0001 * right(*args))
    with pytest.raises(engine.EngineError, match=r"parameter layer\.weight") as caught:
        job(verify=True)
    assert (caught.value.code, caught.value.param) == ("verification_failed", "layer.weight")


@pytest.mark.parametrize("budget_bytes", [None, 1])
def test_a_fallback_that_goes_wrong_fails_by_name(job, monkeypatch, budget_bytes):
    kind = contributions.Materialised if budget_bytes is None else contributions.Fallback
    right = kind.blocks

    def wrong(self, start=0):
        return ((first, 1.0001 * block) for first, block in right(self, start))

    monkeypatch.setattr(kind, "blocks", wrong)
    with pytest.raises(engine.EngineError, match="parameter temperature") as caught:
        job(verify=True, budget_bytes=budget_bytes)
    assert (caught.value.code, caught.value.param) == ("verification_failed", "temperature")


def test_a_wrong_column_is_found_though_the_gradient_is_right(job, monkeypatch):
    right, calls = LinearRule.per_sample, []

    def wrong_later(*args):
        calls.append(args)
        return right(*args) * (1.0 if len(calls) <= 4 else 1.0001)

    job()
    monkeypatch.setattr(LinearRule, "per_sample", wrong_later)
    with pytest.raises(engine.EngineError, match=r"parameter layer\."):
        job(verify=True)


def test_gradients_that_are_not_finite_are_not_verified(job):
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    x[0, 0] = torch.inf
    result = engine.analyze(job.program, x, y, ["batch_grad"], verify=True)
    assert not result.groups["batch_grad"].provenance["layer.weight"]["verified"]
    assert sum("not finite: results below it" in warning for warning in result.warnings) == 1


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.layer((x * scale.to(x.dtype)).float())


def test_a_verdict_is_kept_by_the_inputs_shapes_and_dtypes():
    program, y = engine.load(torch.jit.script(Casting())), torch.tensor([0, 1, 2])
    x, scale = torch.randn(3, 4), torch.tensor(2.0)
    for inputs in [(x, scale), (x, scale), (x.double(), scale), (x, scale.double()), (x, scale[None])]:
        engine.analyze(program, inputs, y, ["batch_grad"])
    assert len(program.verdicts) == 4
