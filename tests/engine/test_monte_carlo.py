"""Monte-Carlo quantities: unbiased within their standard error, equal for equal seeds, draws that extend each other."""

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript

import curvature_engine as engine
from curvature_engine import columns

DRAWS = 2000
BATCHES = 100
NAMES = (
    *("mlp", "cnn", "residual_batchnorm", "convolutions", "layernorm_gelu", "embedding", "shared_weight"),
    *("if_and_loop", "two_inputs", "extra_axis"),
)


def setup(name, loss):
    case = {c.name: c for c in CASES}[name]
    module, inputs = build(case)
    return torchscript(module, inputs, case.ways[-1]), inputs, targets_for(module(*inputs), loss)


def mc(name, M, label=None):
    return {"name": name, "label": label or name, "options": {"mc_samples": M}}


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_unbiased_within_four_standard_errors(name, loss):
    script, inputs, targets = setup(name, loss)
    program = engine.load(script)
    exact = engine.analyze(program, inputs, targets, ["diag_ggn_exact", "kflr"], loss=loss)
    M = DRAWS // BATCHES
    runs = [
        engine.analyze(program, inputs, targets, [mc("diag_ggn_mc", M), mc("kfac", M)], loss=loss, seed=seed)
        for seed in range(BATCHES)
    ]
    for parameter, expected in exact["diag_ggn_exact"].items():
        means = torch.stack([r["diag_ggn_mc"][parameter] for r in runs])
        check_mean(means, expected)
    for parameter, expected in exact["kflr"].items():
        check_mean(torch.stack([r["kfac"][parameter].B for r in runs]), expected.B)
        if expected.A is not None:
            assert torch.equal(runs[0]["kfac"][parameter].A, expected.A)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "extra_axis"])
def test_per_sample_quantities_are_unbiased_too(name, loss):
    script, inputs, targets = setup(name, loss)
    program = engine.load(script)
    exact = engine.analyze(program, inputs, targets, ["batch_diag_ggn_exact", "sqrt_ggn_exact"], loss=loss)
    M = DRAWS // BATCHES
    requests = [mc("batch_diag_ggn_mc", M), mc("sqrt_ggn_mc", M)]
    runs = [engine.analyze(program, inputs, targets, requests, loss=loss, seed=seed) for seed in range(BATCHES)]
    for parameter, expected in exact["batch_diag_ggn_exact"].items():
        check_mean(torch.stack([r["batch_diag_ggn_mc"][parameter] for r in runs]), expected)
    # Whole blocks, not their diagonals alone, of the last layer's bias: [V, N, C] → [N, C, C].
    parameter = list(exact["sqrt_ggn_exact"])[-1]
    expected = block(exact["sqrt_ggn_exact"][parameter])
    check_mean(torch.stack([block(r["sqrt_ggn_mc"][parameter]) for r in runs]), expected)


def block(columns):
    return torch.einsum("vna,vnb->nab", columns, columns)


def test_sampled_quantities_share_their_draws():
    script, inputs, targets = setup("cnn", "cross_entropy")
    requests = [mc("diag_ggn_mc", 3), mc("batch_diag_ggn_mc", 3), mc("sqrt_ggn_mc", 3)]
    result = engine.analyze(script, inputs, targets, requests)
    for parameter, diagonal in result["diag_ggn_mc"].items():
        assert result["sqrt_ggn_mc"][parameter].shape == (3, 4, *diagonal.shape)
        torch.testing.assert_close(result["batch_diag_ggn_mc"][parameter].sum(0), diagonal, rtol=1e-12, atol=1e-14)
        squares = result["sqrt_ggn_mc"][parameter].square().sum((0, 1))
        torch.testing.assert_close(squares, diagonal, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("through", ["stretches", "autograd"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual_batchnorm"])
def test_requests_with_other_numbers_of_draws_have_their_own(name, through, monkeypatch):
    if through == "autograd":
        monkeypatch.setattr(columns, "find_stretches", lambda *_: [])
    script, inputs, targets = setup(name, "cross_entropy")
    program = engine.load(script)
    numbers = {"diag_ggn_mc": 1, "kfac": 2, "sqrt_ggn_mc": 5, "batch_diag_ggn_mc": 7}
    requests = [mc(name, M) for name, M in numbers.items()]
    together = engine.analyze(program, inputs, targets, ["variance", *requests])
    drawn = engine.analyze(program, inputs, targets, [mc("sqrt_ggn_mc", 1, "root"), mc("sqrt_ggn_mc", 7)])
    for parameter, root in drawn["sqrt_ggn_mc"].items():
        root = root * 7**0.5  # [V, N, *p], of single draws
        of_five = root[:5] / 5**0.5
        assert_close(drawn["root"][parameter], root[:1])
        assert_close(together["diag_ggn_mc"][parameter], root[0].square().sum(0))
        assert_close(together["sqrt_ggn_mc"][parameter], of_five)
        assert_close(together["batch_diag_ggn_mc"][parameter], root.square().sum(0) / 7)
    for request in requests:
        label = request["label"]
        for parameter, expected in engine.analyze(program, inputs, targets, [request])[label].items():
            found = together[label][parameter]
            if label == "kfac":
                assert_close(found.B, expected.B)
            else:
                assert_close(found, expected)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def check_mean(batches, expected):
    """Each batch is a mean of M draws; their spread gives the standard error of the mean over all draws."""
    error = batches.std(0) / BATCHES**0.5
    z = (batches.mean(0) - expected).abs() / error.clamp(min=1e-14)
    assert (z[expected.abs() > 1e-12] < 4).all()


def test_equal_seeds_give_equal_bits_whatever_runs_beside():
    script, inputs, targets = setup("cnn", "cross_entropy")
    alone = engine.analyze(script, inputs, targets, [mc("diag_ggn_mc", 3)], seed=7)
    beside = engine.analyze(script, inputs, targets, ["variance", mc("kfac", 5), mc("diag_ggn_mc", 3)], seed=7)
    other = engine.analyze(script, inputs, targets, [mc("diag_ggn_mc", 3)], seed=8)
    for parameter, value in alone["diag_ggn_mc"].items():
        assert torch.equal(value, beside["diag_ggn_mc"][parameter])
        assert not torch.equal(value, other["diag_ggn_mc"][parameter])


def test_more_draws_extend_fewer():
    script, inputs, targets = setup("mlp", "cross_entropy")
    requests = [mc("diag_ggn_mc", M, label=f"m{M}") for M in (1, 2, 4)]
    result = engine.analyze(script, inputs, targets, requests)
    for parameter in result["m1"]:
        second = 2 * result["m2"][parameter] - result["m1"][parameter]
        rest = 4 * result["m4"][parameter] - 2 * result["m2"][parameter]
        assert second.min() >= -1e-15
        assert rest.min() >= -1e-15
        assert second.max() > 0
