"""The Hessian's diagonal against second derivatives of every element, over the table of models."""

from functools import cache

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import residuals

BY_NAME = {case.name: case for case in CASES}
ELEMENTWISE = {
    "shared_weight": {"l.weight", "l.bias"},
    "sequence_first": {"l.weight", "l.bias"},
    "if_and_loop": {"a.weight", "a.bias"},
    "hand_written_rnn": {"h.weight", "h.bias"},
    "tied_embedding": {"tok.weight"},
    "lstm": {"rnn.weight_hh_l0", "rnn.bias_hh_l0"},
    "weight_norm": {"v", "g"},
}
"""Parameters whose uses feed each other."""


@cache
def setup(name, loss):
    module, inputs = build(BY_NAME[name])
    reference = Reference(module, inputs, targets_for(module(*inputs), loss), loss, "mean")
    return module, inputs, reference, reference.batch_diag_hessian()


@pytest.mark.parametrize(
    ("name", "loss", "way"),
    [(case.name, loss, way) for case in CASES for loss in case.losses for way in case.ways],
)
def test_equals_brute_force(name, loss, way):
    module, inputs, reference, expected = setup(name, loss)
    requests = ["diag_hessian", "batch_diag_hessian"]
    result = engine.analyze(torchscript(module, inputs, way), inputs, reference.targets, requests, loss=loss)
    scale = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        # Some parameters have no curvature but rounding: measure by the model's largest.
        torch.testing.assert_close(result["batch_diag_hessian"][parameter], value, rtol=1e-10, atol=1e-11 * scale)
        torch.testing.assert_close(result["diag_hessian"][parameter], value.sum(0), rtol=1e-10, atol=1e-11 * scale)
    methods = {p: entry["method"] for p, entry in result.groups["diag_hessian"].provenance.items()}
    slow = ELEMENTWISE.get(name, set()) | BY_NAME[name].fallback
    assert {p for p, method in methods.items() if method == "fallback"} == slow


@pytest.mark.parametrize("budget_bytes", [1, None])
@pytest.mark.parametrize("name", ["cnn", "lstm", "hand_written_rnn", "attention", "convolutions"])
def test_the_sum_alone_and_some_samples(name, budget_bytes):
    module, inputs, reference, expected = setup(name, "cross_entropy")
    script = torchscript(module, inputs, "traced")
    samples = [2, 0, 2]
    some = [
        {"name": e, "options": {"subsampling": samples}, "label": e} for e in ("diag_hessian", "batch_diag_hessian")
    ]
    alone = engine.analyze(script, inputs, reference.targets, ["diag_hessian"], budget_bytes=budget_bytes)
    result = engine.analyze(script, inputs, reference.targets, some, budget_bytes=budget_bytes)
    for parameter, value in expected.items():
        torch.testing.assert_close(alone["diag_hessian"][parameter], value.sum(0), rtol=1e-10, atol=1e-13)
        value = value[samples]
        torch.testing.assert_close(result["batch_diag_hessian"][parameter], value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result["diag_hessian"][parameter], value.sum(0), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("activation", "most"), [(nn.ReLU, 0), (nn.GELU, 50), (nn.Tanh, 50)])
def test_one_second_backward_per_output_of_a_curved_layer(activation, most, monkeypatch):
    calls = []
    backward = residuals.backward

    def counted(outputs, *arguments, create_graph=False):
        calls.append(create_graph)
        return backward(outputs, *arguments, create_graph=create_graph)

    monkeypatch.setattr(residuals, "backward", counted)
    module = nn.Sequential(nn.Linear(40, 25), activation(), nn.Linear(25, 3))
    x, targets = torch.randn(6, 40), torch.tensor([0, 1, 2, 0, 1, 2])
    engine.analyze(torch.jit.script(module), x, targets, ["diag_hessian"])
    # 25 for each of weight and bias, where the weight alone has 1,000 elements; for ReLU not one. Four look for bends.
    assert len(calls) <= (most and most + 4 + 4)


def test_progress_reaches_its_end():
    module, inputs, reference, _ = setup("mlp", "cross_entropy")
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    script = torchscript(module, inputs, "traced")
    engine.analyze(script, inputs, reference.targets, ["variance", "diag_hessian"], progress=report)
    assert seen == [(i + 1, 1 + 2 + 4) for i in range(7)]


class HardGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x):
        z = self.l(x)
        return (z * nn.functional.hardsigmoid(z)).mean(1)


def test_an_operator_without_second_derivative_is_refused():
    x, targets = torch.randn(3, 5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(engine.EngineError, match=r"cannot be differentiated twice: .*not implemented") as caught:
        engine.analyze(torch.jit.script(HardGate()), x, targets, ["diag_hessian"])
    assert caught.value.code == "unsupported_model"
    assert "leave diag_hessian" in caught.value.remedy


class Tied(nn.Module):
    """One weight, used plain and transposed, side by side: its uses meet in every element."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.w) * torch.sigmoid(nn.functional.linear(x.flip(1), self.w.t()))


class Halves(nn.Module):
    """One weight consumed in two halves that multiply each other, and once whole."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        a, b = self.w.chunk(2)
        h = torch.tanh(x @ a.t()) * (x @ b.t())
        return torch.cat([h, h.square()], -1) * torch.tanh(nn.functional.linear(x, self.w))


@pytest.mark.parametrize("positions", [(), (6,)], ids=["by components", "by elements"])
@pytest.mark.parametrize("make", [Tied, Halves])
def test_uses_that_meet(make, positions):
    torch.manual_seed(0)
    module = make().double()
    x, targets = torch.randn(2, 5, *positions, 4, dtype=torch.float64)
    expected = Reference(module, (x,), targets, "mse", "sum").batch_diag_hessian()["w"]
    result = engine.analyze(torch.jit.script(module), x, targets, ["batch_diag_hessian"], loss="mse", reduction="sum")
    torch.testing.assert_close(result["batch_diag_hessian"]["w"], expected, rtol=1e-10, atol=1e-12)
    assert result.groups["batch_diag_hessian"].provenance["w"]["method"] == "closed form"


class Silent(nn.Module):
    """Layers whose outputs are zero: what a product makes of them has no gradient, but a second derivative."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.l = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(3, 2)
        self.join = join
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        a, b = self.a(x.transpose(0, 1)), self.b(x.transpose(0, 1))
        if self.join == "square":
            h = a * a
        elif self.join == "cosine":
            h = torch.cos(a)
        elif self.join == "across samples":
            h = a * b.roll(1, 1) + a * a.flip(1)
        else:
            h = a.sum(1, keepdim=True).square() + b
        return self.l(x[:, 0]) + h.sum(0)


@pytest.mark.parametrize("join", ["square", "cosine", "across samples", "sum over samples"])
@pytest.mark.parametrize("samples", [3, 4])
def test_second_derivatives_where_first_ones_are_silent(samples, join):
    torch.manual_seed(0)
    module = Silent(join).double()
    x, targets = torch.randn(samples, 4, 3, dtype=torch.float64), torch.randn(samples, 2, dtype=torch.float64)
    expected = Reference(module, (x,), targets, "mse", "mean").batch_diag_hessian()
    for script in (torch.jit.script(module), torch.jit.trace(module, x)):
        result = engine.analyze(script, x, targets, ["diag_hessian", "batch_diag_hessian"], loss="mse")
        for parameter, value in expected.items():
            torch.testing.assert_close(result["batch_diag_hessian"][parameter], value, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(result["diag_hessian"][parameter], value.sum(0), rtol=1e-10, atol=1e-14)
