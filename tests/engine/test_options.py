"""What options change: scale, and what a quantity is taken over."""

from functools import cache

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.reference import Reference

import curvature_engine as engine
from curvature_engine.extensions import EXTENSIONS
from curvature_engine.losses import LOSSES
from curvature_engine.options import complete_options

BY_NAME = {case.name: case for case in CASES}
FIRST_ORDER = {"batch_grad": 1, "batch_l2": 2, "batch_dot": 2, "sum_grad_squared": 2, "variance": 2}
NAMES = ["mlp", "cnn", "shared_weight", "lstm", "no_rule", "extra_axis", "bare_parameters"]


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
    assert group.provenance["batch_dot"]["method"] == ("fallback" if name == "no_rule" else "closed form")


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
    original = engine.closed_form.ClosedForm.gradients

    def watched(self, block):
        gradients = original(self, block)
        largest.append(gradients.nbytes)
        return gradients

    monkeypatch.setattr(engine.closed_form.ClosedForm, "gradients", watched)
    module = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
    x, targets = torch.randn(64, 40, 30), torch.randn(64, 40, 3)
    engine.analyze(torch.jit.script(module), x, targets, ["batch_dot"], loss="mse", budget_bytes=40_000)
    assert max(largest) <= 20_000


# Subsampling

SAMPLES = [2, 0, 2]
SECOND_ORDER = ["diag_ggn", "batch_diag_ggn", "sqrt_ggn"]


def of_samples(reference, extension):
    """Brute force on some samples, Z left alone."""
    if extension in FIRST_ORDER:
        g = {p: b[SAMPLES] for p, b in reference.batch_grad().items()}
        return {p: reference.reduced(extension, b) for p, b in g.items()}
    whole = reference.sqrt_ggn() if extension == "sqrt_ggn_exact" else reference.batch_diag_ggn()
    if extension == "sqrt_ggn_exact":
        return {p: b[:, SAMPLES] for p, b in whole.items()}
    return {p: b[SAMPLES].sum(0) if extension == "diag_ggn_exact" else b[SAMPLES] for p, b in whole.items()}


@pytest.mark.parametrize("budget_bytes", [None, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", [*NAMES, "embedding", "masked_rows", "residual_batchnorm", "if_and_loop"])
def test_subsampling_takes_these_samples_with_the_whole_batch_s_Z(name, loss, reduction, budget_bytes):
    reference = setup(name, loss, reduction)[2]
    extensions = [*FIRST_ORDER, *(f"{e}_exact" for e in SECOND_ORDER)]
    requests = [asked(e, subsampling=SAMPLES) for e in extensions]
    result = analyze(name, loss, reduction, requests, budget_bytes=budget_bytes)
    for extension in extensions:
        for parameter, value in of_samples(reference, extension).items():
            close(result[extension][parameter], value)


@pytest.mark.parametrize("name", ["mlp", "extra_axis", "no_rule"])
def test_a_subsample_keeps_its_draws(name):
    whole = analyze(name, "cross_entropy", "mean", [asked("sqrt_ggn_mc", mc_samples=3)])["sqrt_ggn_mc"]
    some = analyze(
        name,
        "cross_entropy",
        "mean",
        [asked(f"{e}_mc", mc_samples=3, subsampling=SAMPLES) for e in SECOND_ORDER],
    )
    for parameter, columns in whole.items():
        columns = columns[:, SAMPLES]
        close(some["sqrt_ggn_mc"][parameter], columns)
        close(some["batch_diag_ggn_mc"][parameter], columns.square().sum(0))
        close(some["diag_ggn_mc"][parameter], columns.square().sum((0, 1)))


def test_a_subsample_beside_the_whole():
    requests = ["batch_grad", {"name": "batch_grad", "label": "some", "options": {"subsampling": SAMPLES}}]
    result = analyze("cnn", "cross_entropy", "mean", requests)
    for parameter, gradients in result["batch_grad"].items():
        close(result["some"][parameter], gradients[SAMPLES])
    assert "subsampling" in result.groups["some"].convention


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([0, 4], r"names sample 4; the batch has 4 \(0 … 3\)"),
        ([-1], "each item a whole number from 0, or None; got .-1."),
        ([], r"got \[\]"),
        ([0.5], "0.5"),
        ([True], "True"),
        (2, "got 2"),
        ("01", "list"),
    ],
)
def test_a_subsample_that_is_none_is_refused(indices, match):
    with pytest.raises(engine.EngineError, match=match) as caught:
        analyze("mlp", "cross_entropy", "mean", [asked("batch_grad", subsampling=indices)])
    assert (caught.value.code, caught.value.param) == ("invalid_option", "batch_grad.subsampling")


# Saliency, noise scale


def test_saliency_takes_either_diagonal():
    parameters = setup("cnn", "cross_entropy", "mean")[2].parameters
    requests = [asked("saliency", diagonal="mc", mc_samples=3), asked("diag_ggn_mc", mc_samples=3)]
    result = analyze("cnn", "cross_entropy", "mean", requests)
    for parameter, diagonal in result["diag_ggn_mc"].items():
        close(result["saliency"][parameter], parameters[parameter].detach() ** 2 * diagonal / 2)
    assert result.groups["saliency"].provenance["0.weight"]["mc_samples"] == 3
    exact = analyze("cnn", "cross_entropy", "mean", [asked("saliency", mc_samples=3), "diag_ggn_exact"])
    for parameter, diagonal in exact["diag_ggn_exact"].items():
        close(exact["saliency"][parameter], parameters[parameter].detach() ** 2 * diagonal / 2)
    assert exact.groups["saliency"].provenance["0.weight"]["mc_samples"] is None


def test_one_sample_has_no_noise_scale():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(engine.EngineError, match="at least two samples; got 1; give a larger batch"):
        engine.analyze(torch.jit.script(module), torch.randn(1, 3), torch.tensor([1]), ["gradient_noise_scale"])


@pytest.mark.parametrize("entry", [*EXTENSIONS.values(), *LOSSES.values()], ids=lambda entry: entry.summary)
def test_defaults_fit_as_they_are_declared(entry):
    """Nobody looks at them again where they are taken."""
    defaults = {name: schema["default"] for name, schema in entry.options.items()}
    assert complete_options("it", entry.options, defaults, "it") == complete_options("it", entry.options, {}, "it")
