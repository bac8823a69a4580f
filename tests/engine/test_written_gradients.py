"""Individual gradients written to where they stay: all at once, in small blocks, scaled, and when memory runs out."""

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_engine import closed_form, reductions
from curvature_engine.contributions import Fallback
from curvature_engine.reductions import write_outer
from curvature_engine.rules.convolution import ConvolutionRule
from curvature_engine.rules.linear import LinearRule

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
N = 7


class Net(nn.Module):
    """Direct, grouped and transposed convolutions, linear layers with one row a sample and with several."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(4, 6, (2, 3), groups=2, bias=False)
        self.c = nn.ConvTranspose2d(6, 3, 2, stride=2, padding=1)
        self.rows = nn.Linear(4, 5)
        self.d, self.scale = nn.Linear(60, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        x = torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))
        return self.d(torch.tanh(self.rows(x)).flatten(1)) * self.scale


@pytest.fixture
def case():
    module = Net().double().eval()
    x, y = torch.randn(N, 2, 8, 9, dtype=torch.float64), torch.randint(0, 3, (N,))
    losses = nn.functional.cross_entropy(module(x), y, reduction="none") / N
    expected = {}
    for n in range(N):
        for (name, p), g in zip(
            module.named_parameters(),
            torch.autograd.grad(losses[n], list(module.parameters()), retain_graph=True),
            strict=True,
        ):
            expected.setdefault(name, torch.empty(N, *p.shape, dtype=torch.float64))[n] = g
    return engine.load(torch.jit.script(module)), x, y, expected


def check(found, expected, factor=1.0):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], factor * gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beside", [[], ["variance", "batch_l2", "sum_grad_squared"]])
@pytest.mark.parametrize("held", [1, 4000, 2**30])
@pytest.mark.parametrize("scale", ["loss", "sample"])
def test_blocks_of_any_size(case, monkeypatch, held, scale, beside):
    program, x, y, expected = case
    monkeypatch.setattr(closed_form, "_HELD_BYTES", held)
    blocks, original = [], ConvolutionRule.per_sample_into

    def noted(self, role, saved, g, out):
        blocks.append(len(g))
        return original(self, role, saved, g, out)

    monkeypatch.setattr(ConvolutionRule, "per_sample_into", noted)
    requests = [{"name": name, "options": {"scale": scale}} for name in ("batch_grad", *beside)]
    found = engine.analyze(program, x, y, requests)
    least = min(N, torch.get_num_threads())  # a block has a sample for every thread
    assert max(blocks) <= least if held == 1 else N in blocks
    assert {*blocks} == {N} if held == 2**30 else min(blocks) <= least
    factor = N if scale == "sample" else 1.0
    check(found["batch_grad"], expected, factor)
    for name, gradient in expected.items():
        g = factor * gradient
        if beside:
            torch.testing.assert_close(found["variance"][name], g.var(0, correction=0), rtol=1e-9, atol=1e-16)
            torch.testing.assert_close(found["batch_l2"][name], g.flatten(1).square().sum(1), rtol=1e-10, atol=1e-16)
            torch.testing.assert_close(found["sum_grad_squared"][name], g.square().sum(0), rtol=1e-10, atol=1e-16)


def test_square_roots_of_several_draws_are_scaled(case):
    program, x, y, _ = case
    request = [{"name": name, "options": {"mc_samples": 3}} for name in ("sqrt_ggn_mc", "diag_ggn_mc")]
    found = engine.analyze(program, x, y, request)
    for name, columns in found["sqrt_ggn_mc"].items():
        torch.testing.assert_close(columns.square().sum((0, 1)), found["diag_ggn_mc"][name], rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("rule", [ConvolutionRule, LinearRule])
def test_where_all_at_once_lacks_memory_blocks_are_written(case, monkeypatch, rule):
    program, x, y, expected = case
    original, failed = rule.per_sample_into, []

    def scarce(self, role, saved, g, out):
        if len(g) > 2:
            failed.append(len(g))
            raise RuntimeError(NO_MEMORY)
        return original(self, role, saved, g, out)

    monkeypatch.setattr(rule, "per_sample_into", scarce)
    found = engine.analyze(program, x, y, ["batch_grad"])
    assert failed
    assert any("halved" in warning for warning in found.warnings)
    check(found["batch_grad"], expected)


def test_an_error_of_another_kind_is_raised(case, monkeypatch):
    program, x, y, _ = case

    def broken(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(LinearRule, "per_sample_into", broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.analyze(program, x, y, ["batch_grad"])


def test_scaled_gradients_of_the_fallback():
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x, cotangent = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    plain = Fallback(x @ w, [w], cotangent)
    expected = 2.5 * torch.einsum("ni,nj->nij", x, cotangent)
    assert plain.scaled(1.0) is plain
    torch.testing.assert_close(plain.scaled(2.5).materialised(), expected, rtol=1e-12, atol=0)
    chosen = plain.scaled(2.5).select(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(chosen.materialised(), expected[[2, 0, 2]], rtol=1e-12, atol=0)
    assert plain.scaled(2.5).shape == (3, 2)


@pytest.mark.parametrize("past_caches", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outer_products_are_single_multiplications(dtype, past_caches, monkeypatch):
    monkeypatch.setattr(reductions, "_stores_past_caches", lambda: past_caches)
    left, right = torch.randn(5, 7, dtype=dtype), torch.randn(5, 9, dtype=dtype)
    for a, b in [(left, right), (left[::2], right[::2]), (left[:, ::3], right.flip(1)), (left[:1], right[:1])]:
        out = torch.full((len(a), a.shape[1], b.shape[1]), float("nan"), dtype=dtype)
        write_outer(a, b, out)
        assert torch.equal(out, a[:, :, None] * b[:, None])
