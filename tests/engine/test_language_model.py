"""A language model's loss: tied embeddings, outputs [N, T, V], ignored targets; every extension against brute force."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tests.engine.models import torchscript
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine.extensions import EXTENSIONS
from curvature_engine.losses import LossSpec

TOLERANCE = 1e-10
N, T, V, D = 4, 5, 7, 4
IGNORED = 2
DRAWS = 3
LOSS = {"name": "cross_entropy", "options": {"ignore_index": IGNORED, "class_axis": "last"}}
REFERENCED = [
    *("grad", "batch_grad", "batch_l2", "batch_dot", "sum_grad_squared", "variance"),
    *("diag_ggn_exact", "batch_diag_ggn_exact", "saliency"),
]
APPROXIMATIONS = ["expand", "reduce", "backpack"]
MC = ["diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc"]
REQUESTS = [
    *("batch_loss", "outputs", *REFERENCED, "gradient_noise_scale", "sqrt_ggn_exact"),
    *("diag_hessian", "batch_diag_hessian"),
    *({"name": name, "options": {"mc_samples": DRAWS}} for name in MC),
    *({"name": "kflr", "label": f"kflr_{a}", "options": {"approximation": a}} for a in APPROXIMATIONS),
    *(
        {"name": "kfac", "label": f"kfac_{a}", "options": {"approximation": a, "mc_samples": DRAWS}}
        for a in APPROXIMATIONS
    ),
]


class Decoder(nn.Module):
    """One block of a decoder with learnt positions; its output layer is the embedding."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, D), nn.Embedding(8, D)
        self.norm = nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 6), nn.Linear(6, D)
        self.out = nn.Linear(D, V, bias=False)
        self.out.weight = self.tok.weight

    def forward(self, tokens):
        places = torch.arange(tokens.size(1), device=tokens.device)
        x = self.tok(tokens) + self.pos(places)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        future = places[None, :] > places[:, None]
        scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(future, -1e9)
        x = x + self.proj(scores.softmax(-1) @ v)
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(x)


def cross_entropy(outputs, targets, reduction):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


class Sampled(Reference):
    """The reference with given square roots of the Hessians."""

    roots = None

    def hessian_root(self, n):
        return super().hessian_root(n) if self.roots is None else self.roots[n]


@cache
def model():
    torch.manual_seed(0)
    module, tokens = Decoder().double().eval(), torch.randint(0, V, (N, T))
    targets = torch.randint(0, V, (N, T))
    targets[0, 1:] = IGNORED  # one position counts
    targets[1] = IGNORED  # none does
    targets[2, [0, 3]] = IGNORED
    targets[3] = torch.tensor([0, 1, 3, 4, 5])
    return module, (tokens,), targets


@cache
def reference_of(reduction):
    module, inputs, targets = model()
    return Sampled(module, inputs, targets, cross_entropy, reduction)


@cache
def analysis_of(reduction, way):
    module, inputs, targets = model()
    script = torchscript(module, inputs, way)
    return engine.analyze(script, inputs, targets, REQUESTS, loss=LOSS, reduction=reduction)


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def exact_columns(reference, n):
    """As the conventions write them, [T·V, V·T]: rows as the outputs stand, column c·T + t."""
    p = reference.outputs[n].detach().softmax(-1)
    counts = reference.targets[n] != IGNORED
    S = torch.zeros(T, V, V, T, dtype=p.dtype)
    for t in range(T):
        S[t, :, :, t] = counts[t] * (torch.diag(p[t].sqrt()) - torch.outer(p[t], p[t].sqrt())) / reference.Z**0.5
    return S.reshape(T * V, V * T)


def sampled_columns(reference, reduction):
    """Per sample [T·V, M]: the softmax minus the label that was drawn, where the target counts."""
    _, _, targets = model()
    outputs = reference.outputs.detach()
    bound = LossSpec.parse(LOSS, reduction).bind(outputs, targets)
    columns = []
    for m in range(DRAWS):
        labels = bound.sampled_column(0, m).argmin(-1)
        score = outputs.softmax(-1) - F.one_hot(labels, V)
        columns.append(score * (targets != IGNORED)[..., None] / reference.Z**0.5)
    return torch.stack(columns, -1).reshape(N, T * V, DRAWS)


def back_propagated(reference, roots):
    """{parameter: J_nᵀ s for every column and sample, [V, N, *p]}."""
    found = {name: [] for name in reference.parameters}
    for n in range(N):
        for name, J in reference.jacobian(n).items():
            found[name].append(torch.einsum("i...,iv->v...", J, roots[n]))
    return {name: torch.stack(rows, 1) for name, rows in found.items()}


BOTH = pytest.mark.parametrize("reduction", ["mean", "sum"])
WAYS = pytest.mark.parametrize("way", ["scripted", "traced"])


@BOTH
@WAYS
def test_first_order_and_diagonals(reduction, way):
    result, reference = analysis_of(reduction, way), reference_of(reduction)
    torch.testing.assert_close(result.loss, reference.loss_value().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result["batch_loss"], reference.contributions().detach(), rtol=1e-12, atol=1e-14)
    assert float(result["batch_loss"][1]) == 0
    torch.testing.assert_close(result["outputs"], reference.outputs.detach(), rtol=1e-12, atol=1e-14)
    for extension in REFERENCED:
        expected = reference.expected(extension)
        assert set(result[extension]) == set(expected)
        for parameter, value in expected.items():
            assert error(result[extension][parameter], value) <= TOLERANCE, (extension, parameter)
    whole = result["gradient_noise_scale"]["*"]
    torch.testing.assert_close(whole, reference.noise_scale(reference.parameters), rtol=1e-9, atol=0)


@BOTH
@WAYS
def test_the_tied_weight_is_one_parameter_under_both_names(reduction, way):
    result = analysis_of(reduction, way)
    assert "out.weight" not in set(result["grad"])
    assert torch.equal(result["grad"]["out.weight"], result["grad"]["tok.weight"])


@BOTH
@WAYS
def test_hessian_diagonals(reduction, way):
    result, expected = analysis_of(reduction, way), reference_of(reduction).batch_diag_hessian()
    for parameter, value in expected.items():
        assert error(result["batch_diag_hessian"][parameter], value) <= TOLERANCE, parameter
        assert error(result["diag_hessian"][parameter], value.sum(0)) <= TOLERANCE, parameter


@BOTH
@WAYS
def test_square_roots_exact_and_sampled(reduction, way):
    result, reference = analysis_of(reduction, way), reference_of(reduction)
    exact = back_propagated(reference, [exact_columns(reference, n) for n in range(N)])
    for parameter, value in exact.items():
        assert error(result["sqrt_ggn_exact"][parameter], value) <= TOLERANCE, parameter
    sampled = back_propagated(reference, sampled_columns(reference, reduction))
    for parameter, value in sampled.items():
        assert error(result["sqrt_ggn_mc"][parameter], value / DRAWS**0.5) <= TOLERANCE, parameter
        assert error(result["batch_diag_ggn_mc"][parameter], value.square().mean(0)) <= TOLERANCE, parameter
        assert error(result["diag_ggn_mc"][parameter], value.square().mean(0).sum(0)) <= TOLERANCE, parameter


@BOTH
@WAYS
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_kronecker_factors(reduction, way, approximation):
    result, reference = analysis_of(reduction, way), reference_of(reduction)
    sampled = Sampled(*model()[:2], reference.targets, cross_entropy, reduction)
    sampled.roots = sampled_columns(reference, reduction) / DRAWS**0.5
    for label, judge in (("kflr", reference), ("kfac", sampled)):
        group = result[f"{label}_{approximation}"]
        expected = judge.kflr(approximation)
        del expected["tok.weight"]
        assert set(group) == set(expected)
        assert (
            "tied across layers of different kinds" in group.missing["tok.weight"]
            or "embedding" in group.missing["tok.weight"]
        )
        for parameter, (B, A) in expected.items():
            assert error(group[parameter].B, B) <= TOLERANCE, parameter
            if A is not None:
                assert error(group[parameter].A, A) <= TOLERANCE, parameter


def test_kfra_names_the_branch():
    module, inputs, targets = model()
    with pytest.raises(engine.EngineError, match=r"aten::add.*joins 2 branches"):
        engine.analyze(torch.jit.script(module), inputs, targets, ["kfra"], loss=LOSS)


def test_no_extension_is_left_out():
    asked = {r if isinstance(r, str) else r["name"] for r in REQUESTS}
    assert asked | {"kfra"} == set(EXTENSIONS)
