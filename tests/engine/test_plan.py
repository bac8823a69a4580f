"""A plan says beforehand what an analysis then does."""

import json

import pytest
import torch
from tests.engine.models import build, targets_for, torchscript
from tests.engine.test_table import BY_NAME, REQUESTS

import curvature_engine as engine

SAMPLED = [{"name": name, "options": {"mc_samples": 3}} for name in ("diag_ggn_mc", "kfac", "sqrt_ggn_mc")]
ALL = [*REQUESTS, *SAMPLED, "diag_hessian", "batch_diag_hessian"]


def case(name, loss="cross_entropy"):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), loss)
    return torchscript(module, inputs, "traced"), inputs, targets


@pytest.mark.parametrize(
    "name", ["residual_batchnorm", "attention", "tied_embedding", "lstm", "masked_rows", "weight_norm"]
)
def test_methods_and_results_are_as_planned(name):
    script, inputs, targets = case(name)
    plan = engine.plan(script, inputs, targets, ALL, loss="cross_entropy")
    result = engine.analyze(script, inputs, targets, ALL, loss="cross_entropy")
    assert result.plan == plan
    for request in plan.requests:
        group = result.groups[request.label]
        if request.extension != "gradient_noise_scale":  # that one is keyed by layers
            assert request.result_bytes == sum(t.nbytes for t in group.tensors.values()), request.label
        for p in request.parameters:
            if p.method == "none":
                assert group.missing[p.parameter] == p.reason
            elif group.kind == "parameters" and p.parameter in group.provenance and request.extension != "grad":
                planned = "closed form" if p.method == "absent" else p.method
                residual = request.extension.endswith("hessian")  # whose second part may fall back alone
                assert group.provenance[p.parameter]["method"] == planned or residual, (request.label, p.parameter)


def test_a_plan_is_plain_data_and_a_table():
    script, inputs, targets = case("cnn")
    plan = engine.plan(script, inputs, targets, ["batch_grad", "kflr"])
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["N"] == 4
    assert [r["label"] for r in told["requests"]] == ["batch_grad", "kflr"]
    assert told["requests"][0]["parameters"][0]["method"] == "closed form"
    assert "batch_grad" in str(plan)


def test_a_plan_runs_no_column(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a column was propagated")

    monkeypatch.setattr(engine.passes.BackwardPasses, "_column", refuse)
    script, inputs, targets = case("cnn")
    engine.plan(script, inputs, targets, ALL)


def test_norms_and_dot_products_say_which_form_they_take():
    module = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
    for T, form in ((1, "gram"), (40, "materialised")):
        x, targets = torch.randn(7, T, 30), torch.randn(7, T, 3)
        plan = engine.plan(torch.jit.script(module), x, targets, ["batch_l2", "batch_dot"], loss="mse")
        assert {r.parameters[0].form for r in plan.requests} == {form}


def test_cost_and_memory_do_not_depend_on_free_memory_and_grow_with_the_columns():
    script, inputs, targets = case("mlp")
    one = engine.plan(script, inputs, targets, [{"name": "diag_ggn_mc", "options": {"mc_samples": 1}}])
    many = engine.plan(script, inputs, targets, [{"name": "diag_ggn_mc", "options": {"mc_samples": 500}}])
    assert many.columns == {"gradient": 0, "exact": 0, "sampled": 500}
    assert many.gradients == pytest.approx(500 * one.gradients)
    assert many.peak_bytes == one.peak_bytes


def sequences(N):
    module = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)), torch.nn.Linear(32, 2))
    return engine.load(torch.jit.script(module)), torch.randn(N, 10, 32), torch.randn(N, 10, 2)


def test_a_forward_pass_counts_what_lies_behind_views():
    program, x, targets = sequences(64)
    plan = engine.plan(program, x, targets, ["variance"], loss="mse")
    assert plan.forward_bytes >= 64 * 10 * (6 * 32 + 2) * 4


def test_a_batch_goes_whole_where_the_plan_fits_and_not_where_it_does_not():
    program, x, targets = sequences(512)
    free = engine.plan(program, x, targets, ["variance"], loss="mse")
    fitting = free.forward_bytes * 39 // 10  # more than a quarter of it goes to the forward pass
    whole = engine.plan(program, x, targets, ["variance"], loss="mse", budget_bytes=fitting)
    assert (whole.chunks, whole.whole_reason) == (1, None)
    assert whole.peak_bytes <= fitting
    tight = free.forward_bytes * 5 // 2  # too little for a probe of all samples, enough for one of a few
    tighter = engine.plan(program, x, targets, ["variance"], loss="mse", budget_bytes=tight)
    assert tighter.chunks == 1
    assert tighter.peak_bytes <= tight
    less = engine.plan(program, x, targets, ["variance"], loss="mse", budget_bytes=free.forward_bytes * 19 // 10)
    assert less.chunks > 1
    assert less.peak_bytes <= less.budget_bytes
    assert engine.plan(program, x, targets, ["variance"], loss="mse", budget_bytes=fitting) == whole


@pytest.mark.parametrize("requests", [["grad"], ["grad", "outputs"], ["batch_l2"]], ids=" ".join)
def test_a_kept_plan_serves_its_kind_only(requests):
    """A warm program plans what a new one does, whatever it planned before."""
    script, (x,), targets = case("mlp")
    warm = engine.load(script)
    kinds = [
        {},
        {"parameters": "*bias"},
        {"budget_bytes": 10**6},
        {"reduction": "sum"},
        {"extensions": [*requests, "variance"]},
        {"extensions": [{"name": "grad", "label": "g"}]},
        {},
    ]
    for kind in kinds:
        asked = kind.get("extensions", requests)
        options = {name: value for name, value in kind.items() if name != "extensions"}
        for n in (len(x), len(x) - 1):
            found = engine.analyze(warm, x[:n], targets[:n], asked, loss="cross_entropy", **options)
            assert found.plan == engine.plan(script, x[:n], targets[:n], asked, loss="cross_entropy", **options)
            found.plan.columns.clear()  # what one caller does to his is of no consequence for others
