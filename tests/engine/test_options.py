"""What options change: scale, and what a quantity is taken over."""

from functools import cache

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.reference import Reference

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}
FIRST_ORDER = {"batch_grad": 1, "batch_l2": 2, "batch_dot": 2, "sum_grad_squared": 2, "variance": 2}
NAMES = ["mlp", "cnn", "shared_weight", "lstm", "extra_axis", "bare_parameters"]


@cache
def setup(name, loss, reduction):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), loss)
    return torchscript(module, inputs, "scripted"), inputs, Reference(module, inputs, targets, loss, reduction)


def analyze(name, loss, reduction, extensions, **options):
    script, inputs, reference = setup(name, loss, reduction)
    return engine.analyze(script, inputs, reference.targets, extensions, loss=loss, reduction=reduction, **options)


def asked(name, **options):
    return {"name": name, "options": options}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_scale_sample_is_without_the_division_by_Z(name, loss, reduction):
    reference = setup(name, loss, reduction)[2]
    result = analyze(name, loss, reduction, [asked(e, scale="sample") for e in FIRST_ORDER])
    for extension, power in FIRST_ORDER.items():
        for parameter, value in reference.expected(extension).items():
            close(result[extension][parameter], value * reference.Z**power)
            assert result.groups[extension].provenance[parameter]["scale"] == "sample"
        assert "without the division by Z" in result.groups[extension].convention


@pytest.mark.parametrize("budget_bytes", [None, 1, 2000])
@pytest.mark.parametrize("scale", ["loss", "sample"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_over_the_model_is_one_tensor(name, loss, scale, budget_bytes):
    reference = setup(name, loss, "mean")[2]
    requests = [asked(e, over="model", scale=scale) for e in ("batch_l2", "batch_dot")]
    result = analyze(name, loss, "mean", requests, budget_bytes=budget_bytes)
    flat = torch.cat([g.reshape(reference.N, -1) for g in reference.batch_grad().values()], 1)
    flat = flat * (reference.Z if scale == "sample" else 1)
    close(result["batch_l2"], flat.square().sum(1))
    close(result["batch_dot"], flat @ flat.T)
    group = result.groups["batch_dot"]
    assert group.kind == "tensor"
    assert set(group.tensors) == set(group.provenance) == {"batch_dot"}
    assert group.provenance["batch_dot"]["method"] == ("fallback" if name == "lstm" else "closed form")


@pytest.mark.parametrize("T", [1, 2, 40])
@pytest.mark.parametrize("budget_bytes", [1, 3000, None])
def test_dot_products_in_either_form_and_any_chunk(T, budget_bytes):
    module = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).double()
    x = torch.randn(7, T, 30, dtype=torch.float64)
    targets = torch.randn(7, T, 3, dtype=torch.float64)
    reference = Reference(module, (x,), targets, "mse", "mean")
    result = engine.analyze(torch.jit.script(module), x, targets, ["batch_dot"], loss="mse", budget_bytes=budget_bytes)
    for parameter, value in reference.expected("batch_dot").items():
        close(result["batch_dot"][parameter], value)


def test_dot_products_never_write_all_gradients_out(monkeypatch):
    largest = []
    original = engine.contributions.ClosedForm._gradients

    def watched(self, block):
        gradients = original(self, block)
        largest.append(gradients.nbytes)
        return gradients

    monkeypatch.setattr(engine.contributions.ClosedForm, "_gradients", watched)
    module = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
    x, targets = torch.randn(64, 40, 30), torch.randn(64, 40, 3)
    engine.analyze(torch.jit.script(module), x, targets, ["batch_dot"], loss="mse", budget_bytes=40_000)
    assert max(largest) <= 20_000
