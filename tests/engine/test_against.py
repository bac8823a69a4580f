"""Dot products with another batch's gradients, against brute force."""

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import cross_products

TOLERANCE = 1e-10


def brute(module, batch, other, loss, reduction):
    """({parameter: [N, N′]}, Z, Z′)."""
    references = [Reference(module, inputs, targets, loss, reduction) for inputs, targets in (batch, other)]
    left, right = (r.batch_grad() for r in references)
    flat = [{name: g.reshape(len(g), -1) for name, g in found.items()} for found in (left, right)]
    products = {name: flat[0][name] @ flat[1][name].T for name in left}
    return products, references[0].Z, references[1].Z


def asked(other, label="dot", **options):
    return {"name": "batch_dot", "label": label, "options": {"against": other, **options}}


def check(actual, expected):
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    assert float((actual - expected).abs().max() / scale) <= TOLERANCE


def batches(case, loss):
    """The module, its batch, and another one of three samples."""
    module, inputs = build(case)
    torch.manual_seed(7)
    others = tuple(x[:3] for x in case.inputs())
    return module, (inputs, targets_for(module(*inputs), loss)), (others, targets_for(module(*others), loss, seed=2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_brute_force(case, reduction):
    loss = case.losses[-1]
    module, batch, other = batches(case, loss)
    extensions = [asked(other), asked(other, "model", over="model"), "batch_dot"]
    script = torchscript(module, batch[0], "scripted")
    result = engine.analyze(script, *batch, extensions, loss=loss, reduction=reduction, verify=True)
    expected, _, _ = brute(module, batch, other, loss, reduction)
    assert set(result["dot"]) == set(expected)
    for parameter, value in expected.items():
        check(result["dot"][parameter], value)
    check(result["model"], sum(expected.values()))
    assert result["batch_dot"][next(iter(expected))].shape == (4, 4)


def test_with_itself_it_is_the_plain_one():
    module, inputs = build(CASES[0])
    y = torch.tensor([0, 1, 2, 1])
    result = engine.analyze(module, inputs, y, ["batch_dot", asked((inputs, y))])
    for parameter, value in result["batch_dot"].items():
        check(result["dot"][parameter], value)


def test_each_batch_has_its_own_z_and_subsampling_picks_rows_of_the_first():
    module, batch, other = batches({c.name: c for c in CASES}["cnn"], "mse")
    options = {"scale": "sample", "subsampling": [2, 0, 2]}
    result = engine.analyze(module, *batch, [asked(other, **options)], loss="mse")
    expected, Z, Z_other = brute(module, batch, other, "mse", "mean")
    assert Z_other != Z
    for parameter, value in expected.items():
        check(result["dot"][parameter], (Z * Z_other * value)[[2, 0, 2]])


class Tokens(nn.Module):
    """A tied language model, wide enough for the Gram form, for sequences of any length."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(9, 40), nn.Linear(40, 40)
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(tokens))))).transpose(1, 2)


@pytest.mark.parametrize("budget_bytes", [None, 40_000])
@pytest.mark.parametrize("gram", [True, False])
def test_sequences_of_another_length_in_either_form(gram, budget_bytes, monkeypatch):
    torch.manual_seed(0)
    module = Tokens().double().eval()
    if not gram:
        monkeypatch.setattr(cross_products, "_gram_sizes", lambda *_: None)
    batch, other = (
        ((torch.randint(0, 9, (N, T)),), torch.randint(0, 9, (N, T)).masked_fill(torch.rand(N, T) < 0.2, -100))
        for N, T in ((5, 2), (7, 4))
    )
    result = engine.analyze(module, *batch, [asked(other)], loss="cross_entropy", budget_bytes=budget_bytes)
    expected, _, _ = brute(module, batch, other, "cross_entropy", "mean")
    for parameter, value in expected.items():
        check(result["dot"][parameter], value)
    (plan,) = result.plan.requests
    assert {p.form for p in plan.parameters if p.parameter == "hidden.weight"} == {"gram" if gram else "materialised"}
    assert plan.parameters[0].shape == (9, 40)
    assert result.groups["dot"].tensors["hidden.weight"].nbytes == plan.parameters[1].result_bytes


def test_the_plan_counts_the_other_batchs_memory_once():
    module, batch, other = batches({c.name: c for c in CASES}["cnn"], "mse")
    peaks = [
        engine.plan(module, *batch, extensions, loss="mse").peak_bytes
        for extensions in (["batch_dot"], [asked(other)], [asked(other), asked(other, "model", over="model")])
    ]
    others_forward = engine.plan(module, *other, ["grad"], loss="mse").forward_bytes
    assert peaks[1] - peaks[0] > others_forward / 2
    assert peaks[2] - peaks[1] < others_forward / 2


class Switching(nn.Module):
    """The first sample's sign says which of two layers is used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.a(x) if bool(x.sum() > 0) else self.b(x)
        return self.head(torch.tanh(x))


def test_a_parameter_that_one_batch_does_not_reach_gives_zeros():
    module = Switching().double()
    x = torch.rand(4, 3, dtype=torch.float64)
    batch, other = ((x,), torch.randn(4, 2).double()), ((-x[:3],), torch.randn(3, 2).double())
    result = engine.analyze(torch.jit.script(module), *batch, [asked(other)], loss="mse")
    expected, _, _ = brute(module, batch, other, "mse", "mean")
    assert not any(bool(result["dot"][f"{layer}.weight"].any()) for layer in "ab")
    assert bool(result["dot"]["head.weight"].any())
    for parameter, value in expected.items():
        check(result["dot"][parameter], value)


class Coupled(nn.Module):
    """Couples the samples of batches of more than three."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        if len(x) > 3:
            h = h - h.mean(0)
        return self.head(h)


X, Y = torch.randn(3, 3), torch.tensor([0, 1, 1])
WIDE = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("other", "code", "reason"),
    [
        (WIDE, "coupled_samples", "in the batch given as dot's against: samples are coupled"),
        ((X[:, :2], Y), "invalid_inputs", "in the batch given as dot's against: the model rejected"),
        ((X, Y[:2]), "invalid_targets", "in the batch given as dot's against: the model returned 3 samples"),
        ((X, torch.tensor([0, 1, 2])), "invalid_targets", "in the batch given as dot's against"),
        ((X, torch.rand(3, 2)), "loss_required", "in the batch given as dot's against: a default loss exists only"),
        ((X[:0], Y[:0]), "empty_batch", "in the batch given as dot's against: the batch is empty"),
        ((X, [0, 1, 1]), "invalid_targets", "in the batch given as dot's against: targets must be one tensor"),
    ],
)
def test_what_is_wrong_with_the_other_batch_names_it(other, code, reason):
    with pytest.raises(engine.EngineError, match=reason) as caught:
        engine.analyze(torch.jit.script(Coupled()), X, Y, [asked(other)])
    assert (caught.value.code, caught.value.param) == (code, "batch_dot.against")


@pytest.mark.parametrize("given", [X, "batch", (X,), {"sha256": "0" * 64}])
def test_something_else_than_a_batch_is_refused(given):
    with pytest.raises(engine.EngineError, match="against must be a batch") as caught:
        engine.analyze(torch.jit.script(Coupled()), X, Y, [asked(given)])
    assert (caught.value.code, caught.value.param) == ("invalid_option", "batch_dot.against")


def test_the_result_says_what_its_axes_are_and_how_it_came_about():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.power = nn.Linear(3, 2), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return torch.logaddexp(self.layer(x), self.power)

    group = engine.analyze(Mixed(), X, Y, [asked((X, Y))]).groups["dot"]
    assert group.convention.startswith("[N, N′]: ⟨g_n, g′_m⟩")
    assert (group.provenance["layer.weight"]["method"], group.provenance["power"]["method"]) == (
        "closed form",
        "fallback",
    )
    assert all(entry["verified"] for entry in group.provenance.values())
