"""Attention: vision transformers, shifted windows, mixers, encoders and decoders of language."""

import math

import torch
import torch.nn.functional as F
from tests.engine.zoo.entry import CLASSES, Entry, images, sequences, settled, together, tokens
from torch import nn


class SelfAttention(nn.Module):
    """By hand or fused; one product for queries, keys and values."""

    def __init__(self, width, heads, fused=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.fused = heads, fused

    def forward(self, x):
        n, t, e = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(e // self.heads)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, e))


class Block(nn.Module):
    def __init__(self, width, fused=False, scale=False):
        super().__init__()
        self.norm1, self.attn = settled(nn.LayerNorm(width)), SelfAttention(width, 2, fused)
        self.norm2 = settled(nn.LayerNorm(width))
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.scale1 = nn.Parameter(torch.full((width,), 0.5)) if scale else None
        self.scale2 = nn.Parameter(torch.full((width,), 0.5)) if scale else None

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + (y if self.scale1 is None else y * self.scale1)
        y = self.mlp(self.norm2(x))
        return x + (y if self.scale2 is None else y * self.scale2)


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021: patches, a class token, a table of positions."""

    def __init__(self, fused=False, scale=False, distilled=False):
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 2, stride=2)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.dist = nn.Parameter(torch.randn(1, 1, 4)) if distilled else None
        self.pos = nn.Parameter(torch.randn(1, 6 if distilled else 5, 4))
        self.block, self.norm, self.head = Block(4, fused, scale), settled(nn.LayerNorm(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        pieces = [self.cls.expand(x.shape[0], -1, -1)]
        if self.dist is not None:
            pieces.append(self.dist.expand(x.shape[0], -1, -1))
        x = torch.cat([*pieces, x], dim=1) + self.pos
        return self.head(self.norm(self.block(x))[:, 0])


class ScriptableVisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(2, 4, 2, stride=2), nn.Parameter(torch.randn(1, 1, 4))
        self.pos, self.attn = nn.Parameter(torch.randn(1, 5, 4)), SelfAttention(4, 2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], dim=1) + self.pos
        return self.head(self.attn(x)[:, 0])


class ShiftedWindows(nn.Module):
    """Liu et al. 2021: attention in windows, shifted by a roll, with a mask and a table of relative positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(2, 4, 1), settled(nn.LayerNorm(4))
        self.qkv, self.proj, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.table = nn.Parameter(torch.randn(9, 2))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", relative[..., 0] * 3 + relative[..., 1])
        regions = torch.zeros(1, 4, 4, 1)
        for i, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
            for j, columns in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
                regions[:, rows, columns, :] = 3 * i + j
        windows = self.partition(regions).squeeze(2)
        differ = windows[:, None, :] != windows[:, :, None]
        self.register_buffer("mask", torch.zeros(4, 4, 4, dtype=torch.float64).masked_fill(differ, -100.0))

    def partition(self, x):
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        shortcut = x
        windows = self.partition(torch.roll(self.norm(x), shifts=(-1, -1), dims=(1, 2)))
        qkv = self.qkv(windows).reshape(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 2**-0.5, qkv[1], qkv[2]
        scores = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        scores = scores.view(-1, 4, 2, 4, 4) + self.mask.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, 2, 4, 4).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 4, 4))
        y = y.view(-1, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4)
        y = torch.roll(y, shifts=(1, 1), dims=(1, 2)) + shortcut
        return self.head(y.mean((1, 2)))


class ContinuousPositions(nn.Module):
    """Swin V2: cosine attention with a learned temperature, biases from a small network on relative positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, CLASSES)
        self.temperature = nn.Parameter(torch.full((2, 1, 1), 1.5))
        self.positions = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
        relative = (torch.arange(4)[:, None] - torch.arange(4)).double()
        self.register_buffer("relative", (relative.sign() * (relative.abs() + 1).log()).unsqueeze(-1))

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.size(0), 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.temperature, max=4.6).exp()
        bias = 16 * torch.sigmoid(self.positions(self.relative)).permute(2, 0, 1)
        y = (scores + bias.unsqueeze(0)).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


class Mixer(nn.Module):
    """Tolstikhin et al. 2021: MLPs across tokens and across channels."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = settled(nn.LayerNorm(4)), settled(nn.LayerNorm(4))
        self.across = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.within = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.within(self.norm2(x))
        return self.head(x.mean(1))


class LearnedQueries(nn.Module):
    """Perceiver, DETR: learned queries attend to the batch."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.attn, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        q = self.queries.unsqueeze(0).expand(x.size(0), -1, -1)
        y = self.attn(q, x, x, need_weights=False)[0]
        return self.out(y.flatten(1))


class TorchEncoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


class TorchDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerDecoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x, memory):
        later = torch.ones(3, 3, dtype=torch.bool).triu(1)
        return self.out(self.layer(x, memory, tgt_mask=later)[:, -1])


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as GPT-2 has it."""

    def __init__(self, width_out, width_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width_out) * 0.5)
        self.bias = nn.Parameter(torch.randn(width_out))
        self.width = width_out

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(x.size(0), x.size(1), self.width)


class GPT2(nn.Module):
    """Radford et al. 2019: causal mask from a buffer, positions from shapes, output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(6, 4), nn.Embedding(8, 4)
        self.ln1, self.ln2, self.lnf = (settled(nn.LayerNorm(4)) for _ in range(3))
        self.attn, self.proj = Conv1D(12, 4), Conv1D(4, 4)
        self.fc, self.out = Conv1D(6, 4), Conv1D(4, 6)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("causal", torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8))

    def forward(self, ids):
        n, t = ids.size(0), ids.size(1)
        x = self.wte(ids) + self.wpe(torch.arange(0, t, dtype=torch.long, device=ids.device).unsqueeze(0))
        q, k, v = self.attn(self.ln1(x)).split(4, dim=2)
        q = q.view(n, t, 2, 2).transpose(1, 2)
        k = k.view(n, t, 2, 2).transpose(1, 2)
        v = v.view(n, t, 2, 2).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) / 2**0.5
        scores = torch.where(self.causal[:, :, :t, :t], scores, -1e9)
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(n, t, 4)
        x = x + self.proj(y)
        x = x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))
        return self.head(self.lnf(x))


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Llama(nn.Module):
    """Touvron et al. 2023: rotary positions, RMSNorm, SwiGLU, grouped queries, fused causal attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.q, self.k, self.v = nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.o = nn.Linear(8, 4, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((4, 5), (4, 5), (5, 4)))
        self.norm1, self.norm2, self.norm = RMSNorm(4), RMSNorm(4), RMSNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1], dtype=torch.float64)[:1])

    def rotate(self, x, cos, sin):
        a, b = x[..., :1], x[..., 1:]
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, ids):
        n, t = ids.size(0), ids.size(1)
        h = self.embed(ids)
        angles = torch.arange(t, dtype=h.dtype, device=ids.device)[:, None] * self.frequencies[None, :]
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        x = self.norm1(h)
        q = self.rotate(self.q(x).view(n, t, 4, 2).transpose(1, 2), cos, sin)
        k = self.rotate(self.k(x).view(n, t, 2, 2).transpose(1, 2), cos, sin)
        v = self.v(x).view(n, t, 2, 2).transpose(1, 2)
        k = k[:, :, None].expand(n, 2, 2, t, 2).reshape(n, 4, t, 2)
        v = v[:, :, None].expand(n, 2, 2, t, 2).reshape(n, 4, t, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(y.transpose(1, 2).reshape(n, t, 8))
        x = self.norm2(h)
        h = h + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(self.norm(h))


class Bert(nn.Module):
    """Devlin et al. 2019: word, position and segment tables, an additive mask from the batch, a pooler."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(6, 4, padding_idx=0), nn.Embedding(5, 4)
        self.segment, self.norm = nn.Embedding(2, 4), settled(nn.LayerNorm(4, eps=1e-12))
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.norm1, self.norm2 = settled(nn.LayerNorm(4)), settled(nn.LayerNorm(4))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.pooler, self.classifier = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.register_buffer("ids", torch.arange(5).unsqueeze(0))

    def forward(self, ids, mask):
        t = ids.size(1)
        x = self.word(ids) + self.segment(torch.zeros_like(ids)) + self.position(self.ids[:, :t])
        x = self.norm(x)
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e4
        q, k, v = (f(x).view(x.size(0), t, 2, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.transpose(-1, -2)) / 2**0.5 + bias).softmax(-1) @ v
        x = self.norm1(x + self.o(y.transpose(1, 2).flatten(2)))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class T5Encoder(nn.Module):
    """Raffel et al. 2020: relative positions in buckets, added in place to unscaled scores; no biases."""

    def __init__(self):
        super().__init__()
        self.embed, self.buckets = nn.Embedding(6, 4), nn.Embedding(4, 2)
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.norm, self.wi, self.wo = RMSNorm(4), nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, ids):
        t = ids.size(1)
        x = self.embed(ids)
        relative = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        bias = self.buckets((relative > 0).long() * 2 + (relative.abs() > 1).long()).permute(2, 0, 1).unsqueeze(0)
        h = self.norm(x)
        q = self.q(h).view(-1, t, 2, 2).transpose(1, 2)
        k = self.k(h).view(-1, t, 2, 2).transpose(1, 2)
        v = self.v(h).view(-1, t, 2, 2).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        y = torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous().view(-1, t, 4)
        x = x + self.o(y)
        return self.out((x + self.wo(F.relu(self.wi(x)))).mean(1))


class Alibi(nn.Module):
    """Press et al. 2022: slopes per head on distances; attention in one fused call with a float mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, CLASSES)
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x):
        n, t, e = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        distance = (torch.arange(t)[None, :] - torch.arange(t)[:, None]).abs().neg().to(x.dtype)
        bias = self.slopes[:, None, None] * distance
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(n, t, e).mean(1))


class EinsumAttention(nn.Module):
    """As JAX-minded libraries write it: weights with an axis per head."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(2, 4, 2)) for _ in range(3))
        self.wo, self.out = nn.Parameter(torch.randn(2, 2, 4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (self.wq, self.wk, self.wv))
        a = torch.einsum("bhtk,bhsk->bhts", q, k).softmax(-1)
        return self.out(torch.einsum("bhts,bhsk,hkd->btd", a, v, self.wo).mean(1))


class LinearAttention(nn.Module):
    """Katharopoulos et al. 2020."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        context = k.transpose(1, 2) @ v
        norm = q @ k.sum(1, keepdim=True).transpose(1, 2)
        return self.out((q @ context / norm).mean(1))


def mask():
    return (torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),)


LANGUAGE = {"class_axis": -1}

ENTRIES = [
    Entry("ViT", VisionTransformer, images(), ways=("traced", "exported")),
    Entry("ViT, scripted", ScriptableVisionTransformer, images()),
    Entry("DeiT, fused attention, layer scale", lambda: VisionTransformer(True, True, True), images(),
          ways=("traced", "exported")),
    Entry("Swin", ShiftedWindows, images(), ways=("traced", "exported")),
    Entry("Swin V2", ContinuousPositions, sequences()),
    Entry("MLP-Mixer", Mixer, sequences()),
    Entry("learned queries", LearnedQueries, sequences()),
    Entry("nn.TransformerEncoder", TorchEncoder, sequences()),
    Entry("nn.TransformerEncoder, norm first", lambda: TorchEncoder(norm_first=True, activation="gelu"), sequences(),
          ways=("scripted", "traced", "fast path")),
    Entry("nn.TransformerEncoder, fast path", TorchEncoder, sequences(), ways=("fast path",)),
    Entry("nn.TransformerDecoderLayer", TorchDecoder, together(sequences(3), sequences(4))),
    Entry("GPT-2", GPT2, tokens(), **LANGUAGE),
    Entry("Llama", Llama, tokens(), **LANGUAGE),
    Entry("BERT", Bert, together(tokens(), mask), ways=("traced", "exported")),
    Entry("T5 encoder", T5Encoder, tokens()),
    Entry("ALiBi", Alibi, sequences()),
    Entry("einsum attention", EinsumAttention, sequences(), ways=("traced", "exported")),
    Entry("linear attention", LinearAttention, sequences()),
]  # fmt: skip
