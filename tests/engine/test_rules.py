"""Ways in which parameters enter, one module each: closed forms where one is natural, and always the right numbers."""

import pytest
import torch
import torch.nn.functional as F
from tests.engine.checking import build, check, traced
from torch import nn
from torch.nn.utils import parametrizations

N, T = 3, 4


class Way(nn.Module):
    """A parameter `p`, what `use` makes of it and the input, and a linear head."""

    def __init__(self, shape, use, features):
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))
        self.q = nn.Parameter(torch.rand(3, 4))
        self.use, self.out = use, nn.Linear(features, 3)

    def forward(self, x):
        h = self.use(x, self.p, self.q)
        return self.out(torch.tanh(h.flatten(1)))


POSITIONS = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

# name: (shape of p, use, features, what falls back). Inputs are [N, T, 4] with N = 3 and T = 4.
WAYS = {
    "einsum of heads": ((2, 4, 3), lambda x, p, q: torch.einsum("btd,hdk->bhtk", x, p), 24, set()),
    "einsum, batch last": ((4, 3), lambda x, p, q: torch.einsum("btd,dk->tkb", x, p).movedim(2, 0), 12, set()),
    "einsum with ellipsis": ((4, 3), lambda x, p, q: torch.einsum("...d,dk->...k", x, p), 12, set()),
    "einsum of three": ((4, 4, 2), lambda x, p, q: torch.einsum("bti,ijk,btj->bk", x, p, x.tanh()), 2, set()),
    "einsum shares an axis": ((4, 4, 2), lambda x, p, q: torch.einsum("btd,tdk->btk", x, p), 8, set()),
    "einsum sums an axis": ((4, 5, 2), lambda x, p, q: torch.einsum("btd,dsk->bk", x, p), 2, set()),
    "einsum of a diagonal": ((4, 4), lambda x, p, q: torch.einsum("btd,dd->bt", x, p), 4, {"p"}),
    "einsum, implicit output": ((4, 3), lambda x, p, q: torch.einsum("abc,cd", x, p), 12, set()),
    "bmm, batch in the middle": ((4, 4, 2), lambda x, p, q: torch.bmm(x.transpose(0, 1), p).transpose(0, 1), 8, set()),
    "matmul by heads": ((2, 4, 3), lambda x, p, q: x.unsqueeze(1) @ p, 24, set()),
    "matmul, weight first": ((2, 1, 3, 4), lambda x, p, q: p @ x[:, None, None], 24, set()),
    "matmul of a vector": ((4,), lambda x, p, q: x @ p, 4, set()),
    "bilinear": ((3, 4, 4), lambda x, p, q: F.bilinear(x, x.tanh(), p, q[:, 0]), 12, set()),
    "prelu by channel": ((4,), lambda x, p, q: F.prelu(x, p), 16, set()),
    "prelu with one slope": ((1,), lambda x, p, q: F.prelu(x, p), 16, set()),
    "class token": ((1, 1, 4), lambda x, p, q: torch.cat([p.expand(len(x), -1, -1), x], 1), 20, set()),
    "two tokens": (
        (1, 2, 4),
        lambda x, p, q: torch.cat([p.expand(len(x), -1, -1), x, q[None].repeat(len(x), 1, 1)], -2),
        36,
        set(),
    ),
    "expanded bias": ((4,), lambda x, p, q: x + p.expand(x.shape), 16, set()),
    "expanded scale": ((1, 4, 4), lambda x, p, q: x * p.expand(len(x), -1, -1) - q.mean(), 16, set()),
    "divided by it": ((4,), lambda x, p, q: x / p, 16, set()),
    "it divided": ((4,), lambda x, p, q: p / (x**2 + 1), 16, set()),
    "its exponential": ((), lambda x, p, q: x * p.exp(), 16, set()),
    "sum of products": ((4, 3), lambda x, p, q: F.linear(x, (p @ q).t() * 0.5 + torch.eye(4).to(x)), 16, set()),
    "itself and its square": ((4, 4), lambda x, p, q: F.linear(torch.tanh(F.linear(x, p)), p * p), 16, set()),
    "as many positions as samples": ((4, 4), lambda x, p, q: x @ torch.tanh(POSITIONS @ p).t() @ q, 16, set()),
    "two ways past a product": ((4, 4), lambda x, p, q: F.linear(x, torch.tanh(POSITIONS @ p) + p[:3]) @ q, 16, set()),
    "edited when derived": ((4,), lambda x, p, q: x * p.neg().add_(q.sum()), 16, {"p", "q"}),
    "a norm by hand": (
        (4,),
        lambda x, p, q: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * p,
        16,
        set(),
    ),
    "native norm": ((4,), lambda x, p, q: torch.native_layer_norm(x, [4], p, q[0], 1e-5)[0], 16, set()),
    "native group norm": ((4,), lambda x, p, q: torch.native_group_norm(x, p, q[0], 3, 4, 4, 2, 1e-5)[0], 16, set()),
    "given to itself": ((4,), lambda x, p, q: torch.where(x > 0, x, p), 16, {"p"}),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_enter(name):
    shape, use, features, fallback = WAYS[name]
    module, inputs = build(lambda: Way(shape, use, features), (N, T, 4))
    check(module, inputs, traced(module, inputs), fallback=fallback, hessian=True)


class Reparametrised(nn.Module):
    """Weights made of others: by their norm, by their spectral norm, with a low-rank part added."""

    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(4, 5))
        self.b = parametrizations.spectral_norm(nn.Linear(5, 5))
        self.c = nn.Linear(5, 3, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x.mean(1)))))
        return F.linear(h, self.c.weight + 0.5 * self.up @ self.down)


def test_weights_made_of_others():
    module, inputs = build(Reparametrised, (N, T, 4))
    check(module, inputs, traced(module, inputs), hessian=True)


class Bags(nn.Module):
    def __init__(self, mode, weighted=False, rows=False):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 3)
        self.weighted, self.rows = weighted, rows

    def forward(self, indices, offsets, weights):
        indices = indices.view(3, 2) if self.rows else indices
        weights = weights.view(indices.shape) if self.weighted else None
        return self.out(torch.tanh(self.bag(indices, None if self.rows else offsets, weights)))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("sum", {}), ("mean", {}), ("max", {}), ("sum", {"weighted": True}), ("mean", {"rows": True})],
)
@pytest.mark.parametrize("offsets", [[0, 2, 5], [0, 4, 4]])
def test_embedding_bags(mode, options, offsets):
    indices = torch.tensor([1, 6, 2, 2, 0, 3])
    module, inputs = build(lambda: Bags(mode, **options), indices, torch.tensor(offsets), (6,))
    module.double()

    class Batch(nn.Module):  # outputs first, for as many samples as bags
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, offsets, indices, weights):
            return self.inner(indices, offsets, weights)

    inputs = (inputs[1], inputs[0], inputs[2])
    whole = Batch().eval()
    check(whole, inputs, traced(whole, inputs), fallback={"inner.bag.weight"} if mode == "max" else ())
