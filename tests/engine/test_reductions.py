"""Sums over individual gradients: large pieces and many blocks, shorter forms, and what shares one sweep."""

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_engine.reductions import REDUCTIONS, Moments
from curvature_engine.rules import linear
from curvature_engine.rules.embedding import EmbeddingRule
from curvature_engine.rules.linear import LinearRule
from curvature_engine.stores import MemorySlab

FIRST_ORDER = ["batch_grad", "batch_l2", "sum_grad_squared", "variance"]
SMALL, LARGE = (4, 5), (128, 96)  # the large one is reduced row by row


def only(pieces):
    (whole,) = pieces
    return whole


def reduced(name, gradients, size):
    reduction = REDUCTIONS[name]()
    for first in range(0, len(gradients), size):
        reduction.add(first, 0, gradients[first : first + size])
    return reduction.result(only)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("shape", [SMALL, LARGE, ()])
def test_reductions_do_not_depend_on_blocks(shape, size):
    g = torch.randn(10, *shape, dtype=torch.float64) + 3
    torch.testing.assert_close(reduced("sum_squared", g, size), (g**2).sum(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(reduced("squared_norms", g, size), (g**2).reshape(10, -1).sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(reduced("total", g, size), g.sum(0), rtol=1e-13, atol=0)
    found = reduced("moments", g, size)
    torch.testing.assert_close(found.mean, g.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.spread, ((g - g.mean(0)) ** 2).sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_spread_is_centred_before_it_is_squared(shape):
    g = torch.full((12, *shape), 1e8, dtype=torch.float64)
    g[::2] += 1
    spread = reduced("moments", g, 5).spread
    torch.testing.assert_close(spread, torch.full_like(spread, 3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_moments_of_outer_products(noise, transposed):
    generator = torch.Generator().manual_seed(0)
    x, g = (1.0 + noise * torch.randn(20, 1, width, dtype=torch.float64, generator=generator) for width in (6, 5))
    rule = LinearRule(1, transposed=transposed)
    found = rule.moments("weight", [x], g)
    assert isinstance(found, Moments)
    whole = rule.per_sample("weight", [x], g)
    spread = ((whole - whole.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(found.mean, whole.mean(0), rtol=1e-13, atol=0)
    # What is compared with is itself centred after multiplying, and loses with small noise.
    torch.testing.assert_close(found.spread, spread, rtol=1e-14 / noise + 1e-12, atol=0)


@pytest.mark.parametrize("numbers", [1, 5, 12, 2**19])
@pytest.mark.parametrize("alike", [None, 0, 3, 5])
def test_the_moments_of_outer_products_in_blocks(monkeypatch, alike, numbers):
    """One of the rows has gradients that hardly differ: wherever it stands, no block's spread loses by it."""
    monkeypatch.setattr(linear, "_BLOCK_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(20, 1, width, generator=generator) for width in (5, 6))
    if alike is not None:
        x = 1 + x * 1e-4
        g[..., alike] = 1 + g[..., alike] * 1e-4
    found = LinearRule(1, transposed=False).moments("weight", [x], g)
    whole = LinearRule(1, transposed=False).per_sample("weight", [x.double()], g.double())
    torch.testing.assert_close(found.mean.double(), whole.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.spread.double(), ((whole - whole.mean(0)) ** 2).sum(0), rtol=1e-4, atol=0)


def test_equal_samples_have_no_negative_variance():
    x, g = (torch.rand(1, 1, width).expand(9, 1, width) for width in (6, 5))
    found = LinearRule(1, transposed=False).moments("weight", [x], g)
    assert (found.spread >= 0).all()
    assert found.spread.max() <= 1e-12


PADDINGS = [-1, 2]


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_moments_of_an_embedding(padding):
    torch.manual_seed(0)
    indices = torch.tensor([[0, 0, 2], [1, 0, 4], [4, 4, 4], [2, 2, 2]])  # row 3 is picked by nobody, row 4 often
    g, rule = torch.randn(4, 3, 6, dtype=torch.float64), EmbeddingRule(2, 5, padding)
    whole = rule.per_sample("weight", [indices], g)
    found = rule.moments("weight", [indices], g)
    torch.testing.assert_close(found.mean, whole.mean(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(found.spread, ((whole - whole.mean(0)) ** 2).sum(0), rtol=1e-13, atol=1e-15)


def test_the_spread_of_an_embedding_is_centred_before_it_is_squared():
    indices, rule = torch.zeros(12, 1, dtype=torch.int64), EmbeddingRule(2, 2, -1)
    g = torch.full((12, 1, 3), 1e8, dtype=torch.float64)
    g[::2] += 1
    spread = rule.moments("weight", [indices], g).spread
    torch.testing.assert_close(spread[0], torch.full((3,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not spread[1].any()


RULES = {
    "linear": (LinearRule(2, transposed=False), "weight", (5, 6)),
    "transposed": (LinearRule(2, transposed=True), "weight", (6, 5)),
    "scaled": (LinearRule(2, transposed=False, alpha=0.5), "weight", (5, 6)),
    "bias": (LinearRule(2, transposed=False, beta=2.0), "bias", (5,)),
    **{f"embedding, padding {p}": (EmbeddingRule(2, 7, p), "weight", (7, 5)) for p in PADDINGS},
}


@pytest.mark.parametrize("T", [1, 2, 40])
@pytest.mark.parametrize("name", RULES)
def test_gradients_written_into_memory_and_added_to_what_is_there(name, T):
    torch.manual_seed(0)
    rule, role, shape = RULES[name]
    g = torch.randn(4, T, 5, dtype=torch.float64)
    x = torch.randint(7, (4, T)) if "embedding" in name else torch.randn(4, T, 6, dtype=torch.float64)
    expected = rule.per_sample(role, [x], g)
    assert expected.shape == (4, *shape)
    out = torch.full((4, *shape), torch.nan, dtype=torch.float64)
    if rule.per_sample_into(role, [x], g, out):
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
    before = torch.randn(4, *shape, dtype=torch.float64)
    out = before.clone()
    rule.add_per_sample(role, [x], g, out)
    torch.testing.assert_close(out, before + expected, rtol=1e-13, atol=1e-14)
    for reduction, axes in (("sum_squared", (0,)), ("squared_norms", tuple(range(1, 1 + len(shape))))):
        found = getattr(rule, reduction)(role, [x], g)
        assert rule.is_reduced(reduction, role, [x[:1]], g[:1]) == (found is not None)
        if found is not None:
            torch.testing.assert_close(found, expected.square().sum(axes), rtol=1e-12, atol=1e-13)


class Tied(nn.Module):
    """An embedding whose weight comes back as that of two products: in one order, and in the other."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(160, 64), nn.Linear(64, 64)

    def forward(self, x):
        h = torch.tanh(self.mix(self.embed(x.abs().mul(100.0).long().clamp(max=159))))
        h = torch.tanh(nn.functional.linear(h, self.embed.weight) @ self.embed.weight)
        return nn.functional.linear(h, self.embed.weight).sum(1)


class Gathered(nn.Module):
    """A weight that enters whole, and in part after being turned."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(96, 96) / 10), nn.Linear(64, 3)

    def forward(self, x):
        h = torch.tanh(nn.functional.linear(x, self.weight))
        return self.out(torch.tanh(nn.functional.linear(h, self.weight.t()[:64])).sum(1))


NETS = {
    "tied": (Tied, (5,)),
    "gathered": (Gathered, (5, 96)),
    "wide convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(24, 48, 5, padding=2), nn.Tanh(), nn.Conv2d(48, 16, 3, stride=2), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(64, 3)),
        ),
        (24, 6, 6),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(16, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 8, 3)),
        (16, 4, 4, 4),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Flatten(), nn.Linear(640, 3)), (5, 96)),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_large_parameters_in_many_blocks(name, alone):
    make, shape = NETS[name]
    torch.manual_seed(0)
    net, N = make().double(), 90
    x, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(0, 3, (N,))
    program = engine.load(torch.jit.script(net))
    requests = [[e] for e in FIRST_ORDER] if alone else [FIRST_ORDER]
    found = {
        label: group.by_parameter
        for asked in requests
        for label, group in engine.analyze(program, x, y, asked).groups.items()
    }
    losses = nn.functional.cross_entropy(net(x), y, reduction="none") / N
    rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    for place, (parameter, _) in enumerate(net.named_parameters()):
        g = torch.stack([row[place] for row in rows])
        expected = {
            "batch_grad": g,
            "batch_l2": g.flatten(1).square().sum(1),
            "sum_grad_squared": g.square().sum(0),
            "variance": g.var(0, unbiased=False),
        }
        for label, tensor in expected.items():
            error = (found[label][parameter] - tensor).abs().max()
            assert error <= 1e-12 * tensor.abs().max(), (label, parameter)


def test_a_large_slab_is_zero_and_its_own():
    slabs = [MemorySlab((3, 2**18), 1, torch.float64, torch.device("cpu")) for _ in range(2)]
    slabs[0].write([1], torch.ones(1, 2**18, dtype=torch.float64))
    assert slabs[0].result()[1].eq(1).all()
    assert not slabs[0].result()[[0, 2]].any()
    assert not slabs[1].result().any()
