"""What a front end knows of a model before it runs."""

import pytest
import torch
import torch.nn.functional as F
from tests.engine.models import CASES, build, torchscript
from torch import nn

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}


def front_of(name, way):
    module, inputs = build(BY_NAME[name])
    return engine.load(torchscript(module, inputs, way)).front


def uses(front):
    return {parameter: [use.operator for use in found] for parameter, found in front.consumers().items()}


@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_operators_are_counted(way):
    assert front_of("mlp", way).operators() == {"linear": 2, "tanh": 1}


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shared_weight", {"l.weight": ["linear"] * 2, "l.bias": ["linear"] * 2}),
        ("tied_embedding", {"tok.weight": ["embedding", "linear"], "pos.weight": ["embedding"]}),
        ("packed_projection", {"w": ["matmul", "linear"]}),
        ("lstm", {"rnn.weight_hh_l0": ["lstm"]}),
        ("bare_parameters", {"scale": ["mul"], "shift": ["sub"], "w": ["matmul"], "b": ["add"], "d": ["addmm"]}),
    ],
)
def test_consumers_are_found_through_attributes_lists_and_movers(name, expected, way):
    front = front_of(name, way)
    found = uses(front)
    assert set(found) == set(front.parameters)
    assert expected.items() <= found.items()


def test_consumers_in_branches_and_loops_count_once_each():
    found = uses(front_of("if_and_loop", "scripted"))
    assert found["a.weight"] == ["linear", "linear"]
    assert found["b.weight"] == ["linear"]


class Carried(nn.Module):
    """A parameter that reaches its operator only through a branch and a loop."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        w = self.w if x.size(0) > 2 else self.v
        for _ in range(2):
            x = F.linear(x, w.t())
            w = self.v
        return x


def test_consumers_are_found_through_control_flow():
    front = engine.load(torch.jit.script(Carried())).front
    assert uses(front) == {"w": ["linear"], "v": ["linear"]}
    assert "F.linear(x, w.t())" in front.consumers()["w"][0].place


def test_the_format_is_named():
    program = engine.load(torch.jit.script(nn.Linear(2, 2)))
    assert program.format == "torchscript"
    result = engine.analyze(program, torch.randn(3, 2), torch.tensor([0, 1, 0]), ["grad"])
    assert result.info["format"] == "torchscript"


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)

    def forward(self, x):
        return torch.cat([self.l(x[i : i + 1]) for i in range(x.shape[0])])


def test_a_trace_that_keeps_to_its_own_batch_size_is_refused():
    trace = torch.jit.trace(Split(), torch.randn(3, 2))
    with pytest.raises(engine.EngineError, match=r"returned 3 rows .* for 5 samples: .* baked in"):
        engine.analyze(trace, torch.randn(5, 2), torch.zeros(5, dtype=torch.long), ["grad"])
