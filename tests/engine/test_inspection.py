"""What is said of models before they run, held to what runs then do."""

import json

import pytest
import torch
from tests.engine.models import CASES, build
from torch import nn

import curvature_engine as engine

PROBED = ["batch_grad", "diag_ggn_exact", "kflr"]


def scripted(module):
    return torch.jit.script(module)


@pytest.fixture(scope="module")
def convolutional():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4, 3))
    return engine.inspect(scripted(body.eval()))


def named(inspection, name):
    return next(p for p in inspection.parameters if p.name == name)


def test_it_shows_inputs_parameters_buffers_and_operators(convolutional):
    assert convolutional.format == "torchscript"
    assert [(i.name, i.required) for i in convolutional.inputs] == [("input", True)]
    assert [p.name for p in convolutional.parameters] == [
        f"{i}.{kind}" for i in (0, 1, 4) for kind in ("weight", "bias")
    ]
    weight = named(convolutional, "0.weight")
    assert (weight.shape, weight.dtype, weight.trainable) == ((2, 1, 3, 3), "float32", True)
    assert [use.operator for use in weight.uses] == ["conv2d"]
    assert convolutional.buffers == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert {o.name: o.count for o in convolutional.operators}.items() >= {"conv2d": 1, "linear": 1, "relu": 1}.items()
    assert convolutional.unsupported == ()


def test_norms_have_no_kronecker_form_and_everything_else(convolutional):
    scale, weight = named(convolutional, "1.weight"), named(convolutional, "4.weight")
    assert {"kfac", "kflr"} <= scale.none.keys()
    assert scale.none["kflr"] == "no Kronecker form for batch_norm"
    assert {"grad", "batch_grad", "diag_ggn_exact", "diag_hessian"} <= set(scale.closed_form)
    assert {"kfac", "kflr"} <= set(weight.closed_form)
    assert scale.fallback == weight.fallback == ()


def test_an_operator_without_a_rule_means_the_fallback():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.maximum(x, self.scale)

    inspection = engine.inspect(scripted(Model()))
    (scale,) = inspection.parameters
    assert "batch_grad" in scale.fallback
    assert scale.closed_form == ("grad",)
    assert "universal fallback" in scale.none["kflr"]


def test_shared_and_frozen_and_unused_parameters_say_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.second(self.first(x))

    inspection = engine.inspect(scripted(Model()))
    weight = named(inspection, "first.weight")
    assert weight.aliases == ("second.weight",)
    assert len(weight.uses) == 2
    assert "element by element" in weight.note
    assert not named(inspection, "first.bias").trainable
    assert named(inspection, "idle").note == "no operator consumes it: its results are zero"
    assert named(inspection, "idle").none["kfac"] == "does not reach the outputs"


def test_operators_that_are_not_supported_are_listed_with_their_places_and_refused_by_a_run():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) + torch.rand(2)

    module = scripted(Model())
    inspection = engine.inspect(module)
    (found,) = inspection.unsupported
    assert found.name == "aten::rand"
    assert "torch.rand(2)" in found.place
    with pytest.raises(engine.EngineError) as caught:
        engine.analyze(module, torch.randn(4, 3), torch.randn(4, 2), ["batch_grad"])
    assert caught.value.code == "unsupported_operator"
    assert found.place in caught.value.message


def test_it_reads_well_and_goes_through_json(convolutional):
    text = str(convolutional)
    assert "torchscript; inputs: input" in text
    assert "6 parameters, 51 elements; 3 buffers" in text
    assert json.loads(json.dumps(convolutional.to_dict()))["parameters"][0]["shape"] == [2, 1, 3, 3]


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_does_what_was_expected_or_says_less(case, way):
    if way not in case.ways:
        pytest.skip("not this way")
    module, inputs = build(case)
    model = scripted(module) if way == "scripted" else torch.jit.trace(module, inputs)
    program = engine.load(model)
    expected = {p.name: p for p in engine.inspect_program(program).parameters}
    targets = torch.zeros_like(module(*inputs)).detach()
    plan = engine.plan(program, inputs, targets, PROBED, loss="mse", parameters="all")
    for request in plan.requests:
        for planned in request.parameters:
            parameter = expected[planned.parameter]
            if request.extension in parameter.none:
                assert planned.method in ("none", "absent"), planned
            elif request.extension in parameter.fallback:
                assert planned.method == "fallback", planned
            elif not case.opened and request.extension != "kflr" and planned.parameter not in case.fallback:
                assert planned.method in ("closed form", "absent"), planned


def test_an_exported_program_says_the_same_as_its_torchscript():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    )
    example = (torch.randn(4, 4),)
    exported = engine.inspect(torch.export.export(module.eval(), example, dynamic_shapes=({0: torch.export.Dim("n")},)))
    traced = engine.inspect(torch.jit.trace(module, example))
    assert exported.format == "export"
    assert {p.name: (p.closed_form, p.fallback, p.none) for p in exported.parameters} == {
        p.name: (p.closed_form, p.fallback, p.none) for p in traced.parameters
    }
    assert exported.unsupported == traced.unsupported == ()


def test_a_complex_parameter_gets_nothing():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.w).abs()

    (parameter,) = engine.inspect(torch.jit.script(Complex())).parameters
    assert parameter.closed_form == parameter.fallback == ()
    assert set(parameter.none.values()) == {"curvature is defined for real parameters only"}
