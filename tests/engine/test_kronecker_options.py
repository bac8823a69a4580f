"""Options of the Kronecker family: where columns come from, joint biases, strictness."""

import pytest
import torch
from tests.engine.models import CASES, build, targets_for
from torch import nn

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}


def kfac(label=None, **options):
    return {"name": "kfac", "label": label or "kfac", "options": options}


def analyze(module, x, requests, **options):
    module = module.double().eval()
    targets = torch.ones(module(x).shape, dtype=torch.float64)
    return engine.analyze(torch.jit.script(module), x, targets, requests, loss="mse", **options)


def test_sources_are_what_their_names_say():
    module, inputs = build(BY_NAME["cnn"])
    targets = targets_for(module(*inputs), "cross_entropy")
    requests = ["kflr", kfac("type2", fisher="type2", mc_samples=9), kfac("mc"), kfac("empirical", fisher="empirical")]
    result = engine.analyze(torch.jit.script(module), inputs, targets, requests)
    for parameter, pair in result["kflr"].items():
        assert torch.equal(result["type2"][parameter].B, pair.B)
        assert not torch.allclose(result["empirical"][parameter].B, pair.B)
    assert "own targets" in result.groups["empirical"].convention
    seeds = {label: group.provenance["0.weight/B"]["seed"] for label, group in result.groups.items()}
    assert seeds == {"kflr": None, "type2": None, "mc": 0, "empirical": None}


def test_the_empirical_fisher_of_one_position_is_the_sum_of_squared_gradients():
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    requests = ["batch_grad", kfac(fisher="empirical")]
    for reduction, Z in (("mean", 4), ("sum", 1)):
        result = engine.analyze(torch.jit.script(module), inputs, targets, requests, reduction=reduction)
        g = result["batch_grad"]["2.bias"]
        torch.testing.assert_close(result["kfac"]["2.bias"].B, Z * g.T @ g, rtol=1e-12, atol=1e-14)


# Joint biases


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.addmm(self.b, x, self.w, beta=0.5, alpha=2.0)


def test_the_block_of_a_scaled_layer_is_exact():
    x = torch.randn(1, 3, dtype=torch.float64)  # with one sample, B ⊗ A is the block itself
    module = Scaled()
    result = analyze(module, x, [{"name": "kflr", "options": {"joint_bias": True}}, "diag_ggn_exact"])
    B, A = result["kflr"]["w"]
    block = torch.kron(B, A).diagonal().view(2, 4)
    torch.testing.assert_close(block[:, :3].T, result["diag_ggn_exact"]["w"], rtol=1e-12, atol=0)
    torch.testing.assert_close(block[:, 3], result["diag_ggn_exact"]["b"], rtol=1e-12, atol=0)
    assert set(result["kflr"]) == {"w"}
    assert "part of that of w" in result.groups["kflr"].missing["b"]


class Picked(nn.Module):
    """Two rows of the first sample, one of each other."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        keep = x[:, :, 0] > 0
        h = torch.zeros_like(x[..., :2])
        h[keep] = self.l(x[keep])
        return h.sum(1)


@pytest.mark.parametrize(("approximation", "corner"), [("expand", 1.0), ("backpack", 4 / 3)])
def test_padding_rows_are_no_inputs(approximation, corner):
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    x[..., 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    result = analyze(Picked(), x, [kfac(approximation=approximation, joint_bias=True)])
    rows = x[x[..., 0] > 0]
    torch.testing.assert_close(result["kfac"]["l.weight"].A[3, :3], rows.mean(0) * corner)
    assert result["kfac"]["l.weight"].A[3, 3] == pytest.approx(corner)


class OneBias(nn.Module):
    """Two weights that share their bias: no block of one of them holds it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
        self.b.bias = self.a.bias

    def forward(self, x):
        return torch.tanh(self.a(x)) + self.b(x)


def test_a_bias_of_several_weights_keeps_its_own_factor():
    found = analyze(OneBias(), torch.randn(4, 3, dtype=torch.float64), [kfac(joint_bias=True)])["kfac"]
    assert set(found) == {"a.weight", "a.bias", "b.weight"}
    assert found["a.weight"].A.shape == (3, 3)


def test_a_bias_alone_keeps_its_own_factor():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    found = analyze(module, torch.randn(4, 3, dtype=torch.float64), [kfac(joint_bias=True)])["kfac"]
    assert set(found) == {"bias"}


# Strictness


def test_strict_refuses_what_would_be_missing():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(4, 3, dtype=torch.float64)
    assert set(analyze(module, x, [kfac()]).groups["kfac"].missing) == {"1.weight", "1.bias"}
    with pytest.raises(engine.EngineError, match=r"strict: 1.weight has no Kronecker factors .*layer_norm") as caught:
        analyze(module, x, [kfac(strict=True)])
    assert (caught.value.code, caught.value.param) == ("unsupported_model", "1.weight")


def test_strict_counts_a_joint_bias_as_present():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = analyze(module, torch.randn(4, 3, dtype=torch.float64), [kfac(strict=True, joint_bias=True)])["kfac"]
    assert set(found) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("value", [1, "yes", None])
def test_strict_is_true_or_false(value):
    with pytest.raises(engine.EngineError, match="must be True or False; got"):
        analyze(nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.float64), [kfac(strict=value)])
