"""Models whose rows the operators prove, and models whose rows they cannot."""

import torch
import torch.nn.functional as F
from tests.engine.models import CASES, N
from torch import Tensor, nn

EVERY_WAY = ("scripted", "traced", "exported")


def reals(*shape):
    return lambda: (torch.randn(N, *shape, dtype=torch.float64),)


class Residual(nn.Module):
    """A block as ResNets have it: edits in place, and a sum in place."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.n = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.m = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.m(self.b(self.relu(self.n(self.a(x)))))
        y += self.down(x)
        return self.relu(y)


def resnet():
    stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(6, 3)
    return nn.Sequential(*stem, Residual(4, 4, 1), Residual(4, 6, 2), *head)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))


class Patches(nn.Module):
    """A vision transformer: patches, a token for the class, positions."""

    def __init__(self, unfold):
        super().__init__()
        self.unfold = unfold
        self.embed, self.out = nn.Linear(12, 8), nn.Linear(8, 3)
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x):
        if self.unfold:
            h = F.unfold(x, [2, 2], stride=[2, 2]).transpose(1, 2)
        else:
            h = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        h = torch.cat([self.cls.expand(x.shape[0], -1, -1), self.embed(h)], 1) + self.positions
        return self.out(self.encoder(h)[:, 0])


class Windows(nn.Module):
    """Attention in shifted windows, with a table of relative positions: samples and windows share one axis."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("places", torch.arange(16).view(4, 4) % 9)
        self.register_buffer("mask", torch.eye(4).view(4, 1, 4).repeat(1, 4, 1) * -10.0)

    def forward(self, x):
        b = x.shape[0]
        y = torch.roll(self.norm(x), shifts=(-1, -1), dims=(1, 2))
        y = y.view(b, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 4, 4)
        qkv = self.qkv(y).reshape(b * 4, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = q.matmul(k.transpose(-2, -1)) * 0.7
        scores = scores + self.bias[self.places.view(-1)].view(4, 4, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
        scores = scores.view(b, 4, 2, 4, 4) + self.mask.unsqueeze(1).unsqueeze(0)
        y = F.softmax(scores.view(-1, 2, 4, 4), dim=-1).matmul(v).transpose(1, 2).reshape(b * 4, 4, 4)
        y = self.proj(y).view(b, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, 4)
        return self.out((x + torch.roll(y, shifts=(1, 1), dims=(1, 2))).mean((1, 2)))


class Generative(nn.Module):
    """A decoder as GPT-2 has it: products of untransposed weights, masks of the future and of padding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(8, 8)
        self.w, self.b = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(24))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)
        self.register_buffer("past", torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8))

    def forward(self, x):
        b, T = x.size(0), x.size(1)
        h = self.tokens(x) + self.positions(torch.arange(T, device=x.device).unsqueeze(0))
        qkv = torch.addmm(self.b, self.norm(h).view(-1, 8), self.w).view(b, T, 24)
        q, k, v = [t.view(b, T, 2, 4).transpose(1, 2) for t in qkv.split(8, dim=2)]
        scores = (q @ k.transpose(-1, -2)) * 0.5
        scores = torch.where(self.past[:, :, :T, :T], scores, torch.full_like(scores, -1e9))
        scores = scores.masked_fill((x == 0)[:, None, None, :], -1e4)
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, T, 8)
        return self.out((h + y).mean(1))


class Positioned(nn.Module):
    """Positions expanded to the batch before they are looked up, as many as samples; a tied output layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(7, 4), nn.Embedding(N, 4), nn.LayerNorm(4)
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x):
        places = self.norm(self.positions(torch.arange(x.size(1)).expand_as(x)))
        return self.out(torch.tanh(self.l(self.tokens(x) + places)))


class OneHot(nn.Module):
    """As `Positioned`, by a product with what only the batch's shape entered."""

    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(N, N)), nn.Linear(N, 3)

    def forward(self, x):
        places = torch.eye(x.size(1), dtype=x.dtype).expand_as(x)
        return self.out(torch.tanh(x + places @ self.w))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **options)
        self.out = nn.Linear(3 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Summed(nn.Module):
    """Attention in sums of products."""

    def __init__(self):
        super().__init__()
        self.q, self.out, self.w = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        q = self.q(x)
        weights = torch.einsum("bid,bjd->bij", q, x).softmax(-1)
        return self.out(torch.einsum("bij,bjd,...de->bie", weights, q, self.w).amax(1))


class SequenceFirstInside(nn.Module):
    """As many steps as samples, turned over and back."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.l(x.transpose(0, 1)))
        return self.out((h + h.roll(1, 0)).mean(0))


class Remembering(nn.Module):
    """Values that come back by attributes, lists and branches."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.state = torch.zeros(1)

    def forward(self, x):
        self.state = torch.tanh(self.l(x))
        kept = [self.state]
        for _ in range(2):
            kept.append(torch.tanh(self.l(kept[-1])))
        if x.size(1) > 2:
            kept.append(self.state.detach().float().double())
        return self.out(torch.stack(kept).sum(0) + self.state)


PROVED = {
    "resnet": (resnet, reals(3, 9, 9), EVERY_WAY),
    "encoder": (encoder, reals(5, 8), EVERY_WAY),
    "patches": (lambda: Patches(True), reals(3, 4, 4), EVERY_WAY),
    "patches by slices": (lambda: Patches(False), reals(3, 4, 4), EVERY_WAY),
    "windows": (Windows, reals(4, 4, 4), EVERY_WAY),
    "generative": (Generative, lambda: (torch.randint(1, 7, (N, 5)),), EVERY_WAY),
    "positioned": (Positioned, lambda: (torch.randint(7, (N, N)),), EVERY_WAY),
    "one-hot positions": (OneHot, reals(N, N), EVERY_WAY),
    "lstm": (lambda: Recurrent(nn.LSTM), reals(N, 4), EVERY_WAY),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), reals(3, 4), EVERY_WAY),
    "einsum": (Summed, reals(N, 4), EVERY_WAY),
    "sequence first inside": (SequenceFirstInside, reals(N, 4), EVERY_WAY),
    "remembering": (Remembering, reals(4), ("scripted",)),
    **{
        case.name: (case.make, case.inputs, case.ways)
        for case in CASES
        if case.name not in ("in_place", "masked_rows", "if_and_loop", "no_rule")
    },
}
"""Name → (module, a batch, ways): a second batch is not asked for its rows."""


class Gated(nn.Module):
    """Mixes samples as far as a second input lets it."""

    def __init__(self, mix):
        super().__init__()
        self.l, self.out, self.mix = nn.Linear(N, N), nn.Linear(N, 3), mix

    def forward(self, x, gate):
        h = torch.tanh(self.l(x))
        return self.out(h + gate * self.mix(h))


def _into_zeros(h):
    z = torch.zeros(N, N, dtype=h.dtype)
    z.copy_(h)
    return z.mean(0) + h


def _shown_later(h):
    """A view of what is not tracked yet, edited by the batch."""
    z = torch.zeros_like(h)
    row = z[0]
    z += h
    return row + h


MIXES = {
    "gram": lambda h: F.linear(h, h),
    "gram by addmm": lambda h: torch.addmm(h, h, h),
    "gram by matmul": lambda h: h @ h,
    "gram by einsum": lambda h: torch.einsum("ij,kj->ik", h, h),
    "transposed": lambda h: h + h.t(),
    "reshaped": lambda h: h + h.t().reshape(N, N),
    "first of all": lambda h: h[0] + h,
    "expanded": lambda h: h[1:2].expand(N, N) + h,
    "attention over the batch": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "distances": lambda h: torch.cdist(h, h),
    "in pairs": lambda h: h.view(N // 2, 2, N).sum(1, keepdim=True).expand(-1, 2, -1).reshape(N, N),
    "shifted": lambda h: F.pad(h.t(), (1, 0))[:, :-1].t() * h,
    "pooled": lambda h: F.max_pool1d(h.t()[None], 3, 1, 1)[0].t() + h,
    "convolved": lambda h: F.conv1d(h.t()[:, None], torch.ones(1, 1, 3, dtype=h.dtype), padding=1)[:, 0].t(),
    "convolved without a batch axis": lambda h: F.conv1d(h, torch.ones(N, N, 1, dtype=h.dtype)) + h,
    "weights of the batch": lambda h: F.conv1d(h[None], h[:, :, None])[0],
    "sorted": lambda h: h.sort(0)[0] + h,
    "largest": lambda h: h.max(0)[0] + h,
    "picked": lambda h: h[torch.tensor([1, 0, 2, 2])] + h,
    "flattened and rolled": lambda h: h.roll(1) + h,
    "normalised": lambda h: F.normalize(h.flatten(), dim=0).view(N, N),
    "channels": lambda h: F.group_norm(h[None], 1)[0],
    "into zeros": _into_zeros,
    "shown later": _shown_later,
    "upper half": lambda h: h.clone().index_add(0, torch.tensor([0]), h[1:2]),
    "interleaved": lambda h: h[:2].repeat_interleave(2, 0) * h,
    "repeated": lambda h: h[:2].repeat(2, 1) * h,
    "stacked": lambda h: torch.stack([h[0], h[1], h[2], h[0] + h[3]]),
    "chunks": lambda h: torch.cat(h.chunk(2, 0)[::-1]) + h,
}


class GatedPositions(nn.Module):
    """Mixes what was looked up at positions that were expanded to the batch, as far as a second input lets it."""

    def __init__(self, mix):
        super().__init__()
        self.l, self.positions, self.out, self.mix = nn.Linear(N, N), nn.Embedding(N, N), nn.Linear(N, 3), mix

    def forward(self, x, gate):
        e = self.positions(torch.arange(N).expand_as(x))
        h = torch.tanh(self.l(x))[:, :, None] + e
        return self.out(h + gate[:, :, None] * self.mix(e))


POSITION_MIXES = {
    "transposed": lambda e: e.transpose(0, 1) * torch.ones(N).double(),
    "averaged": lambda e: e.mean(0),
    "first of all": lambda e: e[0],
    "rolled": lambda e: e.roll(1, 0),
    "rows as columns": lambda e: e.permute(1, 2, 0),
    "flattened and rolled": lambda e: e.flatten(0, 1).roll(1, 0).view(N, N, N),
    "attention over the batch": lambda e: F.scaled_dot_product_attention(*[e.transpose(0, 1)] * 3).transpose(0, 1),
    "products": lambda e: e[:, 0] @ e[:, 1].t() + e,
    "edited": lambda e: e.clone().index_add(0, torch.tensor([0]), e[1:2]),
    "by the next": lambda e: torch.cat([e[1:], e[:1]]),
}


class KeptInAnAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(N, N), nn.Linear(N, 3)
        self.state = torch.zeros(1)

    def forward(self, x, gate):
        self.state = torch.tanh(self.l(x))
        return self.out(torch.tanh(self.l(x)) + gate * self.state.mean(0))


class KeptInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x, gate):
        own: list[torch.Tensor] = []
        lists = [own]
        lists[0].append(torch.tanh(self.l(x)))
        return self.out(torch.tanh(self.l(x)) + gate * torch.stack(own).mean((0, 1)))


class RowByRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x, gate):
        h, rows = torch.tanh(self.l(x)), []
        for i in range(x.size(0)):
            rows.append(h[i] + gate[i] * h[i - 1])  # noqa: PERF401 (what TorchScript compiles)
        return self.out(torch.stack(rows))


class CastAway(nn.Module):
    """Casts are methods, not operators."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x, gate):
        h = torch.tanh(self.l(x))
        wide = h.float().double()
        return self.out(h + gate * wide.mean(0))


SCRIPTED_MIXES = [KeptInAnAttribute, KeptInAList, RowByRow, CastAway]


class Turned(nn.Module):
    """Couples nothing, but sends rows where no operator's form tells."""

    def __init__(self, turn):
        super().__init__()
        self.l, self.out, self.turn = nn.Linear(3, 3), nn.Linear(3, 3), turn

    def forward(self, x):
        return self.out(self.turn(torch.tanh(self.l(x))))


def _written(h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z[:, 1:] = h[:, 1:]
    return z


UNPROVABLE = {
    "rolled": lambda h: torch.roll(h, 1, 0),
    "flipped": lambda h: h.flip(0),
    "picked": lambda h: h[torch.arange(N - 1, -1, -1)],
    "row by row": lambda h: torch.stack([h[i] for i in range(N)]),
    "written into zeros": _written,
    "halves": lambda h: torch.cat([h[2:], h[:2]]),
}


class SequenceFirst(nn.Module):
    """Inputs [T, N, F], with as many steps as samples: the first axis is not the samples'."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.l(x)).sum(0))


class Neighbours(nn.Module):
    """Rows go where a matrix among the inputs sends them."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, adjacency):
        return self.out(torch.tanh(adjacency @ self.l(x)))
