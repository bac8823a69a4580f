"""One table of models; every numeric test reads it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

N = 4


def images(channels=2, size=6):
    return (torch.randn(N, channels, size, size, dtype=torch.float64),)


def vectors(features=5):
    return (torch.randn(N, features, dtype=torch.float64),)


def tokens(vocabulary=7, length=5):
    return (torch.randint(0, vocabulary, (N, length)),)


def sequences(length=3, features=4):
    return (torch.randn(N, length, features, dtype=torch.float64),)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    ways: tuple[str, ...] = ("scripted", "traced")
    fallback: frozenset[str] = frozenset()
    kronecker: bool = True
    losses: tuple[str, ...] = ("cross_entropy", "mse")
    opened: bool = False
    """Whether a fused operator is opened into elementary ones: then the last bits may differ."""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.m = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.n, self.m):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        x = F.relu(self.m(self.b(x)) + x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(x.flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.out = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) / 2.0).softmax(-1)
        return self.out(self.proj(weights @ v).mean(1))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.norm, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.l(x.transpose(0, 1))))
        h = self.l(h.reshape(-1, 4)).view(h.shape)
        return self.out(h.sum(0))


class Language(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.tok = nn.Embedding(7, 4, padding_idx=0)
        self.pos = nn.Embedding(8, 4)
        self.l = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7 if tied else 3, bias=False)
        if tied:
            self.out.weight = self.tok.weight

    def forward(self, x):
        h = self.tok(x) + self.pos(torch.arange(x.size(1), device=x.device))
        return self.out(torch.tanh(self.l(h)).mean(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.l(torch.tanh(self.l(x)))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        if bool(x.sum() > 0):  # noqa: SIM108 (two branches are what is tested)
            x = self.a(x)
        else:
            x = self.b(x)
        rounds = int(x.abs().max() * 0) + 2
        for _ in range(rounds):
            x = torch.tanh(self.a(x))
        return self.out(x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.out(torch.sigmoid(self.a(x)) * self.b(y))


class Bare(nn.Module):
    """Parameters outside any layer: scale, shift, matmul with a separate bias, addmm with an untransposed weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.shift = nn.Parameter(torch.randn(1, 5))
        self.w, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
        self.c, self.d = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.temperature = nn.Parameter(torch.randn(()))

    def forward(self, x):
        x = torch.tanh(x * self.scale - self.shift)
        x = torch.tanh(torch.matmul(x, self.w) + self.b)
        return torch.addmm(self.d, x, self.c) * self.temperature


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x):
        self.counter.add_(1.0)
        h = self.l(x).relu_()
        y = torch.zeros_like(h)
        y[:, :3] = h[:, 2:]
        y += h
        return self.out(y)


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.out = nn.Linear(15, 3)

    def forward(self, x):
        collected = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            collected.append(x)
        named = {"a": collected[0], "b": collected[1]}
        return self.out(torch.cat([named["b"], named["a"], collected[-1]], 1))


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.g, self.b = (
            nn.Parameter(torch.randn(3, 5)),
            nn.Parameter(torch.randn(3, 1)),
            nn.Parameter(torch.randn(3)),
        )

    def forward(self, x):
        weight = self.g * self.v / self.v.norm(2.0, 1, True)
        return F.linear(x, weight, self.b)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        h, _ = self.rnn(x)
        return self.out(h[:, -1])


class NoRule(nn.Module):
    """A parameter that enters in a way without closed form."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.power = nn.Parameter(torch.rand(4) + 1)

    def forward(self, x):
        return self.out(torch.sigmoid(self.l(x)) ** self.power)


class HandRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.h, self.out = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = torch.zeros(x.size(0), 3, dtype=x.dtype)
        for t in range(x.size(1)):
            state = torch.tanh(self.i(x[:, t]) + self.h(state))
        return self.out(state)


class Packed(nn.Module):
    """A packed projection, consumed in slices and transposed."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 5))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.w.chunk(2)
        return self.out(torch.tanh(x @ a.t()) * F.linear(x, b))


class Masked(nn.Module):
    """Rows picked by the data: an irregular order of samples."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        keep = x[:, :, 0] > -0.5
        h = torch.zeros_like(x)
        h[keep] = torch.tanh(self.l(x[keep]))
        return self.out(h.sum(1))


class Positions(nn.Module):
    """Outputs with an extra axis: classes second, as cross-entropy wants them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(4, 3, 2)

    def forward(self, x):
        return self.a(x.transpose(1, 2))


def frozen():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].weight.requires_grad_(False)
    return net


CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), vectors),
    Case(
        "cnn",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        images,
    ),
    Case("residual_batchnorm", Residual, images),
    Case(
        "windows_of_one_place",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 1, stride=2, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 1, dilation=2, output_padding=(1, 0)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        images,
    ),
    Case(
        "convolutions",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, dilation=2, padding=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, (3, 1), dilation=2, padding="same"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        images,
    ),
    Case(
        "convolutions_1d",
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3, stride=2), nn.Flatten(), nn.LazyLinear(3)
        ),
        lambda: sequences(3, 5),
    ),
    Case(
        "convolutions_3d",
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2, padding=1),
            nn.Tanh(),
            nn.ConvTranspose3d(2, 1, 2, dilation=2),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        lambda: (torch.randn(N, 1, 2, 3, 2, dtype=torch.float64),),
    ),
    Case("layernorm_gelu", Block, sequences),
    Case(
        "groupnorm",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        images,
    ),
    Case("embedding", Language, tokens),
    Case("tied_embedding", lambda: Language(tied=True), tokens, kronecker=False),
    Case("shared_weight", Shared, vectors),
    Case("if_and_loop", Branching, vectors, ways=("scripted",)),
    Case("two_inputs", TwoInputs, lambda: (*vectors(), *vectors(3))),
    Case("attention", Attention, sequences),
    Case("sequence_first", SequenceFirst, sequences, kronecker=False),
    Case("bare_parameters", Bare, vectors, kronecker=False),
    Case("in_place", InPlace, vectors),
    Case("containers", Containers, vectors),
    Case("weight_norm", WeightNorm, vectors, kronecker=False),
    Case("lstm", Recurrent, sequences, opened=True),
    Case("no_rule", NoRule, vectors, fallback=frozenset({"power"})),
    Case("hand_written_rnn", HandRecurrent, sequences),
    Case("packed_projection", Packed, vectors, kronecker=False),
    Case("masked_rows", Masked, sequences, kronecker=False),
    Case("extra_axis", Positions, sequences),
    Case("frozen_parameter", frozen, vectors),
]


def build(case, seed=0):
    """The eager module in eval mode, float64, and its inputs."""
    torch.manual_seed(seed)
    module = case.make()
    inputs = case.inputs()
    module = module.double().eval()
    with torch.no_grad():
        module(*inputs)
    return module, inputs


def targets_for(outputs, loss, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if loss == "mse":
        return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    shape = (outputs.shape[0], *outputs.shape[2:])
    return torch.randint(0, outputs.shape[1], shape, generator=generator)


def torchscript(module, inputs, way):
    return torch.jit.script(module) if way == "scripted" else torch.jit.trace(module, inputs, check_trace=False)


def exported(module, inputs, *, decomposed=False):
    """An exported program whose batch axis, the first of every input, is dynamic."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes self.rnn", UserWarning)  # torch's own LSTM
        program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    return core(program) if decomposed else program


def core(program):
    """A program decomposed into core operators; torch warns of its own internals while it does so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return program.run_decompositions()
