"""Everything else: shared towers, experts, graphs, sets, factor machines, odd layers, several inputs and outputs."""

import torch
import torch.nn.functional as F
from tests.engine.zoo.entry import CLASSES, Entry, N, images, sequences, settled, together, tokens, vectors
from torch import nn
from torch.nn.utils import parametrizations


class Siamese(nn.Module):
    """One tower for two inputs, compared."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.out = nn.Linear(3, CLASSES)

    def forward(self, a, b):
        return self.out((self.tower(a) - self.tower(b)).abs())


class Contrastive(nn.Module):
    """Two encoders and a learned temperature, cosines with constant prototypes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 3))

    def forward(self, x):
        a, b = F.normalize(self.encoder(x), dim=-1), F.normalize(self.prototypes, dim=-1)
        return self.scale.exp() * a @ b.t()


class Experts(nn.Module):
    """A soft mixture, the experts in one batched product."""

    def __init__(self):
        super().__init__()
        self.gate, self.w1 = nn.Linear(4, 2), nn.Parameter(torch.randn(2, 4, 5))
        self.b1, self.w2 = nn.Parameter(torch.randn(2, 1, 5)), nn.Parameter(torch.randn(2, 5, CLASSES))

    def forward(self, x):
        h = torch.relu(torch.bmm(x.unsqueeze(0).expand(2, -1, -1), self.w1) + self.b1)
        y = torch.bmm(h, self.w2)
        return (self.gate(x).softmax(1).t().unsqueeze(2) * y).sum(0)


class Routed(nn.Module):
    """Top-one routing: every expert sees the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        rows = x.reshape(-1, 4)
        weights, chosen = self.gate(rows).softmax(1).max(1)
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            picked = (chosen == i).nonzero().squeeze(1)
            y = y.index_add(0, picked, expert(rows[picked]) * weights[picked].unsqueeze(1))
        return self.out(y.view(x.shape).mean(1))


class GraphNetwork(nn.Module):
    """Kipf & Welling 2017 on a batch of small graphs, given by their adjacency."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x, adjacency):
        degree = adjacency.sum(2, keepdim=True) + 1.0
        x = torch.relu(self.a((adjacency @ x + x) / degree))
        return self.b((adjacency @ x + x) / degree).mean(1)


class GraphAttention(nn.Module):
    """Velickovic et al. 2018: additive attention, masked by the adjacency."""

    def __init__(self):
        super().__init__()
        self.w, self.left, self.right = nn.Linear(4, 3, bias=False), nn.Linear(3, 1), nn.Linear(3, 1)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x, adjacency):
        h = self.w(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(adjacency == 0, -1e9).softmax(2)
        return self.out(F.elu(weights @ h).mean(1))


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        self.rho = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))

    def forward(self, x):
        return self.rho(self.phi(x).sum(1))


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(4, 4, 1), settled(nn.BatchNorm1d(4)), nn.Conv1d(4, 4, 1)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.b(F.relu(self.norm(self.a(x.transpose(1, 2))))).max(2)[0])


class Autoencoder(nn.Module):
    """Decoded with the encoder's weights, transposed."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.c = (nn.Parameter(torch.randn(s)) for s in ((3, 4), (3,), (4,)))

    def forward(self, x):
        return F.linear(torch.sigmoid(F.linear(x, self.w, self.b)), self.w.t(), self.c)


class Variational(nn.Module):
    """The mean path of a variational autoencoder; reconstruction and code in a dictionary."""

    def __init__(self):
        super().__init__()
        self.enc, self.mean, self.log_var = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.dec = nn.Linear(2, 4)

    def forward(self, x, noise):
        h = torch.tanh(self.enc(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.exp(0.5 * log_var) * noise
        return {"reconstruction": self.dec(z), "mean": mean, "log_var": log_var}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h)


class WideAndDeep(nn.Module):
    """Tables for categories beside numbers, with a bag."""

    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Embedding(6, 3), nn.EmbeddingBag(6, 3, mode="mean")
        self.deep, self.wide = nn.Linear(10, 4), nn.Linear(4, CLASSES)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, ids, bags, x):
        h = torch.cat([self.table(ids[:, 0]), self.bag(bags), x], 1)
        return self.out(F.relu(self.deep(h))) + self.wide(x)


class FactorMachine(nn.Module):
    """Rendle 2010: all pairs of fields by their vectors."""

    def __init__(self):
        super().__init__()
        self.bias, self.first, self.second = nn.Parameter(torch.randn(3)), nn.Linear(4, 3), nn.Linear(4, 5, bias=False)
        self.out = nn.Linear(1, 3)

    def forward(self, x):
        square_of_sum = self.second(x).pow(2).sum(1, keepdim=True)
        sum_of_squares = F.linear(x.pow(2), self.second.weight.pow(2)).sum(1, keepdim=True)
        return self.bias + self.first(x) + self.out(0.5 * (square_of_sum - sum_of_squares))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear, self.out = nn.Bilinear(4, 3, 4), nn.Linear(4, CLASSES)

    def forward(self, x, y):
        return self.out(torch.tanh(self.bilinear(x, y)))


class EinsumLayers(nn.Module):
    """A tensor-train layer and a block-diagonal one."""

    def __init__(self):
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 2, 2))
        self.blocks, self.out = nn.Parameter(torch.randn(3, 2, 2)), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.view(-1, 2, 2)
        y = torch.einsum("nij,ior->njor", x, self.g1)
        y = torch.tanh(torch.einsum("njor,rjp->nop", y, self.g2))
        y = torch.einsum("nop,opq->noq", y, self.blocks)
        return self.out(y.flatten(1))


class LowRank(nn.Module):
    """Hu et al. 2022: a frozen weight and a trained update of low rank, as a sum of paths and as a sum of weights."""

    def __init__(self, merged=False):
        super().__init__()
        self.base, self.out, self.merged = nn.Linear(4, 5), nn.Linear(5, CLASSES), merged
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        if self.merged:
            h = F.linear(x, self.base.weight + 2.0 * (self.b @ self.a), self.base.bias)
        else:
            h = self.base(x) + 2.0 * F.linear(F.linear(x, self.a), self.b)
        return self.out(torch.tanh(h))


class Equalised(nn.Module):
    """StyleGAN's layers: weights scaled at run time, a mapping of the code, modulation and demodulation."""

    def __init__(self):
        super().__init__()
        self.map, self.style = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)
        self.weight, self.const = nn.Parameter(torch.randn(3, 2, 3, 3)), nn.Parameter(torch.randn(1, 2, 4, 4))
        self.rgb = nn.Conv2d(3, 1, 1)

    def forward(self, z):
        w = F.leaky_relu(F.linear(z, self.map * 0.5), 0.2)
        x = self.const.repeat(z.size(0), 1, 1, 1) * (self.style(w) + 1)[:, :, None, None]
        return self.rgb(F.leaky_relu(F.conv2d(x, self.weight * 0.25, padding=1), 0.2))


class Spectral(nn.Module):
    """Spectral norm in eval mode, on a linear layer and a convolution; a critic."""

    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
        self.fc = parametrizations.spectral_norm(nn.Linear(3, CLASSES))

    def forward(self, x):
        return self.fc(F.leaky_relu(self.conv(x), 0.2).sum((2, 3)))


class Orthogonal(nn.Module):
    """A weight as a Cayley map of a skew-symmetric matrix, by Neumann's series."""

    def __init__(self):
        super().__init__()
        self.skew, self.out = nn.Parameter(torch.randn(4, 4) * 0.1), nn.Linear(4, CLASSES)

    def forward(self, x):
        a = self.skew.triu(1) - self.skew.triu(1).t()
        eye = torch.eye(4, dtype=x.dtype)
        inverse = eye + a + a @ a + a @ a @ a
        return self.out(torch.tanh(x @ (inverse @ (eye + a))))


class Film(nn.Module):
    """Features scaled and shifted by what another input says."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3, affine=False)
        self.film, self.head = nn.Linear(4, 6), nn.Linear(3, CLASSES)

    def forward(self, x, y):
        scale, shift = self.film(y).chunk(2, 1)
        h = self.norm(self.conv(x)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return self.head(F.relu(h).mean((2, 3)))


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.h, self.t, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        gate = torch.sigmoid(self.t(x))
        return self.out(gate * F.relu(self.h(x)) + (1 - gate) * x)


class Branching(nn.Module):
    """What the data say decides branch and depth."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        if bool(x.sum() > 100.0):
            x = self.b(x)
        else:
            for _ in range(int(x.size(0)) - 1):
                x = torch.tanh(self.a(x))
        return self.out(x)


class Equilibrium(nn.Module):
    """A fixed number of steps to a fixed point, one weight throughout."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.out = nn.Linear(3, 3, bias=False), nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        z, injected = torch.zeros(x.size(0), 3, dtype=x.dtype), self.u(x)
        for _ in range(3):
            z = torch.tanh(self.w(z) + injected)
        return self.out(z)


class Periodic(nn.Module):
    """A field: sines of coordinates with learned frequencies (SIREN, Fourier features)."""

    def __init__(self):
        super().__init__()
        self.frequencies, self.a, self.out = nn.Parameter(torch.randn(4, 3)), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = x @ self.frequencies
        return self.out(torch.sin(3.0 * self.a(torch.cat([z.sin(), z.cos()], -1))))


class RadialBasis(nn.Module):
    """Distances to learned centres."""

    def __init__(self):
        super().__init__()
        self.centres, self.width = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.rand(5) + 0.5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x):
        d = (x[:, None, :] - self.centres[None, :, :]).pow(2).sum(-1)
        return self.out(torch.exp(-d / self.width.pow(2)))


class Splines(nn.Module):
    """Kolmogorov-Arnold: a basis of each input, one coefficient per edge."""

    def __init__(self):
        super().__init__()
        self.coefficients, self.scale = nn.Parameter(torch.randn(CLASSES, 4, 3)), nn.Parameter(torch.randn(CLASSES, 4))
        self.register_buffer("grid", torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))

    def forward(self, x):
        basis = torch.exp(-((x[..., None] - self.grid) ** 2))
        return torch.einsum("nig,oig->no", basis, self.coefficients) + F.linear(F.silu(x), self.scale)


class Norms(nn.Module):
    """Group, instance and layer norm, and one by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv2d(2, 4, 3, padding=1), settled(nn.GroupNorm(2, 4))
        self.instance, self.layer = settled(nn.InstanceNorm2d(4, affine=True)), settled(nn.LayerNorm([4, 4]))
        self.scale, self.head = nn.Parameter(torch.rand(4, 1, 1)), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.layer(torch.tanh(self.instance(torch.tanh(self.group(self.conv(x))))))
        x = x / (x.pow(2).mean(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt() * self.scale
        return self.head(x.amax((2, 3)))


class Frozen(nn.Module):
    """A frozen body, its buffers and a head that learns."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, CLASSES)
        self.body.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(h)


def adjacency():
    return (torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]).double().repeat(N, 1, 1),)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, CLASSES))


ENTRIES = [
    Entry("MLP", mlp, vectors(), chain=True),
    Entry("MLP, normalised", lambda: nn.Sequential(
        nn.Linear(4, 5), settled(nn.BatchNorm1d(5)), nn.PReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Dropout(0.5),
        nn.Linear(4, CLASSES)), vectors()),
    Entry("siamese towers", Siamese, together(vectors(), vectors())),
    Entry("contrastive head", Contrastive, vectors()),
    Entry("soft mixture of experts", Experts, vectors()),
    Entry("routed mixture of experts", Routed, sequences(), ways=("scripted", "traced")),
    Entry("graph convolutions", GraphNetwork, together(sequences(), adjacency)),
    Entry("graph attention", GraphAttention, together(sequences(), adjacency)),
    Entry("Deep Sets", DeepSets, sequences()),
    Entry("PointNet", PointNet, sequences()),
    Entry("autoencoder, tied", Autoencoder, vectors(), loss="mse"),
    Entry("variational autoencoder", Variational, together(vectors(), vectors(2)), loss="mse", output="reconstruction",
          ways=("scripted", "exported")),
    Entry("two heads", TwoHeads, vectors(), output=1),
    Entry("wide and deep", WideAndDeep, together(tokens(1), tokens(2), vectors()), hessian=False),
    Entry("factorisation machine", FactorMachine, vectors()),
    Entry("bilinear", Bilinear, together(vectors(), vectors(3))),
    Entry("tensor train and blocks by einsum", EinsumLayers, vectors()),
    Entry("low-rank update", LowRank, vectors()),
    Entry("low-rank update, merged", lambda: LowRank(merged=True), vectors()),
    Entry("modulated generator", Equalised, vectors(), loss="mse"),
    Entry("spectral norm", Spectral, images(), ways=("traced", "exported")),
    Entry("orthogonal weight", Orthogonal, vectors()),
    Entry("feature-wise modulation", Film, together(images(), vectors())),
    Entry("highway", Highway, vectors()),
    Entry("branch and loop", Branching, vectors(), ways=("scripted",)),
    Entry("equilibrium", Equilibrium, vectors()),
    Entry("periodic field", Periodic, vectors(), loss="mse"),
    Entry("radial basis", RadialBasis, vectors()),
    Entry("splines", Splines, vectors()),
    Entry("norms", Norms, images()),
    Entry("frozen body", Frozen, vectors()),
]  # fmt: skip
