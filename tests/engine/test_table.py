"""Every extension × model × loss × reduction × {scripted, traced} against brute force."""

from functools import cache

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.reference import Reference

import curvature_engine as engine

TOLERANCE = 1e-10
PER_PARAMETER = [
    "grad",
    "batch_grad",
    "batch_l2",
    "batch_dot",
    "sum_grad_squared",
    "variance",
    "diag_ggn_exact",
    "batch_diag_ggn_exact",
    "sqrt_ggn_exact",
    "saliency",
]
APPROXIMATIONS = ["expand", "reduce", "backpack"]
REQUESTS = [
    "batch_loss",
    "outputs",
    *PER_PARAMETER,
    "gradient_noise_scale",
    *({"name": "kflr", "label": a, "options": {"approximation": a}} for a in APPROXIMATIONS),
    *(
        {
            "name": "kfac",
            "label": f"{fisher}_{a}",
            "options": {"approximation": a, "fisher": fisher, "joint_bias": True},
        }
        for fisher in ("type2", "empirical")
        for a in APPROXIMATIONS
    ),
]
BY_NAME = {case.name: case for case in CASES}
COMBINATIONS = [
    pytest.param(case.name, loss, reduction, way, id=f"{case.name}-{loss}-{reduction}-{way}")
    for case in CASES
    for loss in case.losses
    for reduction in ("mean", "sum")
    for way in case.ways
]


@cache
def reference_of(name, loss, reduction):
    module, inputs = build(BY_NAME[name])
    return Reference(module, inputs, targets_for(module(*inputs), loss), loss, reduction)


@cache
def expected_of(name, loss, reduction, extension):
    return reference_of(name, loss, reduction).expected(extension)


@cache
def factors_of(name, loss, reduction, *options):
    return reference_of(name, loss, reduction).kflr(*options)


@cache
def analysis_of(name, loss, reduction, way):
    module, inputs = build(BY_NAME[name])
    reference = reference_of(name, loss, reduction)
    script = torchscript(module, inputs, way)
    result = engine.analyze(script, inputs, reference.targets, REQUESTS, loss=loss, reduction=reduction)
    return script, inputs, result


def error(actual, expected):
    """Largest error relative to the largest entry."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


@pytest.mark.parametrize(("name", "loss", "reduction", "way"), COMBINATIONS)
def test_equals_brute_force(name, loss, reduction, way):
    _, _, result = analysis_of(name, loss, reduction, way)
    reference = reference_of(name, loss, reduction)
    torch.testing.assert_close(result.loss, reference.loss_value().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result["batch_loss"], reference.contributions().detach(), rtol=1e-12, atol=1e-14)
    for extension in PER_PARAMETER:
        expected = expected_of(name, loss, reduction, extension)
        assert set(result[extension]) == set(expected)
        for parameter, value in expected.items():
            assert error(result[extension][parameter], value) <= TOLERANCE, (extension, parameter)


@pytest.mark.parametrize(("name", "loss", "reduction", "way"), COMBINATIONS)
def test_noise_scale_of_layers_and_in_all_equals_brute_force(name, loss, reduction, way):
    _, _, result = analysis_of(name, loss, reduction, way)
    reference = reference_of(name, loss, reduction)
    layers = {}
    for parameter in reference.parameters:
        layers.setdefault(parameter.rpartition(".")[0] or parameter, []).append(parameter)
    scales = result["gradient_noise_scale"]
    assert set(scales) == {*layers, "*"}
    torch.testing.assert_close(scales["*"], reference.noise_scale(reference.parameters), rtol=1e-9, atol=0)
    for layer, names in layers.items():
        expected = reference.noise_scale(names)
        if bool(torch.isfinite(expected)):  # without any gradient there is no scale
            torch.testing.assert_close(scales[layer], expected, rtol=1e-9, atol=0)
        else:
            assert not bool(torch.isfinite(scales[layer]))


@pytest.mark.parametrize(
    ("name", "loss", "reduction", "way"), [c for c in COMBINATIONS if BY_NAME[c.values[0]].kronecker]
)
def test_kronecker_factors_equal_brute_force(name, loss, reduction, way):
    _, _, result = analysis_of(name, loss, reduction, way)
    for approximation in APPROXIMATIONS:
        check_factors(result[approximation], factors_of(name, loss, reduction, approximation))


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize(
    ("name", "loss", "reduction", "way"), [c for c in COMBINATIONS if BY_NAME[c.values[0]].kronecker]
)
def test_joint_kronecker_factors_of_both_fishers_equal_brute_force(name, loss, reduction, way, fisher):
    _, _, result = analysis_of(name, loss, reduction, way)
    for approximation in APPROXIMATIONS:
        group = result[f"{fisher}_{approximation}"]
        expected = factors_of(name, loss, reduction, approximation, fisher, True)
        check_factors(group, expected)
        assert set(group).isdisjoint(set(group.missing))
        for parameter, reason in group.missing.items():
            assert parameter not in expected
            assert ("is part of that of" in reason) == (parameter.replace("bias", "weight") in group), reason


def check_factors(group, expected):
    for parameter, (B, A) in expected.items():
        pair = group[parameter]
        assert error(pair.B, B) <= TOLERANCE, parameter
        assert (pair.A is None) == (A is None)
        if A is not None:
            assert error(pair.A, A) <= TOLERANCE, parameter


@pytest.mark.parametrize(("name", "loss", "reduction", "way"), COMBINATIONS)
def test_forward_equals_torchscript_bit_for_bit(name, loss, reduction, way):
    script, inputs, result = analysis_of(name, loss, reduction, way)
    # The optimising executor rewrites the graph after its first run, and then differs from itself in the last bit.
    with torch.jit.optimized_execution(False):
        own = script(*inputs)
    if BY_NAME[name].opened:
        torch.testing.assert_close(result["outputs"], own, rtol=1e-12, atol=1e-14)
    else:
        assert torch.equal(result["outputs"], own)


@pytest.mark.parametrize("name", BY_NAME)
def test_closed_forms_serve_all_but_the_named_parameters(name):
    case = BY_NAME[name]
    _, _, result = analysis_of(name, "cross_entropy", "mean", case.ways[0])
    provenance = result.groups["variance"].provenance
    assert {p for p, entry in provenance.items() if entry["method"] == "fallback"} == set(case.fallback)
    assert all(entry["verified"] for entry in provenance.values())


def test_one_forward_pass_serves_all_extensions(monkeypatch):
    runs = []
    forward = engine.Program.run
    monkeypatch.setattr(engine.Program, "run", lambda *given, **options: runs.append(1) or forward(*given, **options))
    module, inputs = build(BY_NAME["cnn"])
    engine.analyze(torch.jit.script(module), inputs, targets_for(module(*inputs), "cross_entropy"), REQUESTS)
    assert len(runs) == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "layernorm_gelu", "lstm"])
def test_chunks_do_not_change_results(name):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), "cross_entropy")
    script = torchscript(module, inputs, "traced")
    sampled = ["diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc"]
    requests = [*PER_PARAMETER, *({"name": name, "options": {"mc_samples": 3}} for name in sampled)]
    whole = engine.analyze(script, inputs, targets, requests)
    small = engine.analyze(script, inputs, targets, requests, budget_bytes=1)
    for request in [*PER_PARAMETER, *sampled]:
        for parameter, value in whole[request].items():
            assert error(small[request][parameter], value) <= 1e-12, (request, parameter)


@pytest.mark.parametrize("name", ["mlp", "residual_batchnorm", "attention"])
def test_a_single_sample(name):
    module, inputs = build(BY_NAME[name])
    inputs = tuple(x[:1] for x in inputs)
    targets = targets_for(module(*inputs), "cross_entropy")
    reference = Reference(module, inputs, targets, "cross_entropy", "mean")
    result = engine.analyze(torchscript(module, inputs, "traced"), inputs, targets, ["batch_grad", "diag_ggn_exact"])
    for extension in ("batch_grad", "diag_ggn_exact"):
        for parameter, value in reference.expected(extension).items():
            assert error(result[extension][parameter], value) <= TOLERANCE


def test_inputs_by_name():
    module, (x, y) = build(BY_NAME["two_inputs"])
    targets = targets_for(module(x, y), "mse")
    script = torch.jit.script(module)
    by_name = engine.analyze(script, {"y": y, "x": x}, targets, ["variance"], loss="mse")
    by_place = engine.analyze(script, (x, y), targets, ["variance"], loss="mse")
    for parameter, value in by_place["variance"].items():
        assert torch.equal(by_name["variance"][parameter], value)


def test_ignored_targets_count_neither_in_the_loss_nor_in_Z():
    module, inputs = build(BY_NAME["extra_axis"])
    targets = targets_for(module(*inputs), "cross_entropy").clone()
    targets[0, 0] = targets[2, 1] = -100
    reference = Reference(module, inputs, targets, "cross_entropy", "mean")
    result = engine.analyze(
        torch.jit.script(module), inputs, targets, ["batch_grad", "diag_ggn_exact"], loss="cross_entropy"
    )
    for extension in ("batch_grad", "diag_ggn_exact"):
        for parameter, value in reference.expected(extension).items():
            assert error(result[extension][parameter], value) <= TOLERANCE


def test_the_callers_module_stays_untouched():
    module, inputs = build(BY_NAME["in_place"])
    script = torch.jit.script(module)
    script.train()
    targets = targets_for(module(*inputs), "cross_entropy")
    before = {k: v.clone() for k, v in script.state_dict().items()}
    program = engine.load(script)
    first = engine.analyze(program, inputs, targets, ["outputs"])
    second = engine.analyze(program, inputs, targets, ["outputs"])
    assert torch.equal(first["outputs"], second["outputs"])
    assert script.training
    assert any("eval-mode copy" in w for w in first.warnings)
    assert all(torch.equal(before[k], v) for k, v in script.state_dict().items())
