"""Fused operators opened into elementary ones: the same numbers, and closed forms for every parameter."""

import pytest
import torch
from tests.engine.checking import build, check, traced
from tests.engine.reference import Reference
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import curvature_engine as engine
from curvature_engine.calls import OperatorCall
from curvature_engine.openings import OPENINGS, Elementary
from curvature_engine.tape import Tape

N, T = 3, 4


class Layers(nn.Module):
    """A recurrent layer in all its options, its outputs and final states read."""

    def __init__(self, kind, batch_first, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=batch_first, **options)
        self.out = nn.LazyLinear(3)
        self.batch_first = batch_first

    def forward(self, x):
        y, final = self.rnn(x if self.batch_first else x.transpose(0, 1))
        state = final if isinstance(final, torch.Tensor) else torch.cat(list(final), 2)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.out(torch.cat([y.flatten(1), state.transpose(0, 1).flatten(1)], 1))


class Cells(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.out = kind(3, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        h = self.cell(x[:, 0])
        for t in range(1, 4):
            h = self.cell(x[:, t], h)
        return self.out(h)


class LongCells(Cells):
    def forward(self, x):
        h, c = self.cell(x[:, 0])
        for t in range(1, 4):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h * c)


class PackedSequences(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn, self.out = kind(3, 4, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, final = self.rnn(packed)
        y, _ = pad_packed_sequence(y, batch_first=True)
        state = final if isinstance(final, torch.Tensor) else final[0]
        return self.out(torch.cat([y.sum(1), state.transpose(0, 1).flatten(1)], 1))


class LearnedStart(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
        self.start = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        y, _ = self.rnn(x, self.start.expand(1, x.size(0), 4).contiguous())
        return self.out(y[:, -1])


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "bidirectional": True},
]
RECURRENT = [
    pytest.param(kind, {**options, **more}, batch_first, id=f"{name}-{i}-{batch_first}")
    for name, kind, more in (
        ("lstm", nn.LSTM, {}),
        ("gru", nn.GRU, {}),
        ("tanh", nn.RNN, {}),
        ("relu", nn.RNN, {"nonlinearity": "relu"}),
        ("projected", nn.LSTM, {"proj_size": 2}),
    )
    for i, (options, batch_first) in enumerate(zip(OPTIONS, (True, False, True), strict=True))
]


@pytest.mark.parametrize(("kind", "options", "batch_first"), RECURRENT)
def test_recurrent_layers(kind, options, batch_first):
    module, inputs = build(lambda: Layers(kind, batch_first, **options), (N, T, 3))
    check(module, inputs, traced(module, inputs))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu", "bias": False})],
)
@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_cells(kind, options, way):
    module, inputs = build(lambda: (LongCells if kind is nn.LSTMCell else Cells)(kind, **options), (N, T, 3))
    check(module, inputs, torch.jit.script(module) if way == "scripted" else traced(module, inputs))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"bidirectional": True, "num_layers": 2}), (nn.GRU, {}), (nn.RNN, {"bidirectional": True})],
)
def test_packed_sequences(kind, options):
    module, inputs = build(lambda: PackedSequences(kind, **options), (N, T, 3), torch.tensor([2, 4, 1]))
    script = traced(module, inputs)
    check(module, inputs, script)


def test_lengths_of_another_batch_of_the_same_shapes():
    module, (x, lengths) = build(lambda: PackedSequences(nn.LSTM), (N, T, 3), torch.tensor([1, 4, 3]))
    program = engine.load(traced(module, (x, lengths)))
    for lengths in ([1, 4, 3], [2, 2, 4], [4, 2, 2], [3, 4, 1]):
        check(module, (x, torch.tensor(lengths)), program)


def test_a_learned_initial_state():
    module, inputs = build(LearnedStart, (N, T, 3))
    check(module, inputs, traced(module, inputs), fallback={"start", "rnn.weight_hh_l0", "rnn.bias_hh_l0"})


class FastAttention(nn.Module):
    """What a trace without gradients bakes in: attention's fast path, with its masks."""

    def __init__(self, padded=False, causal=False):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.padded, self.causal = padded, causal

    def forward(self, x):
        padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False, True, False, True]]) if self.padded else None
        later = torch.ones(4, 4, dtype=torch.bool).triu(1) if self.causal else None
        y, weights = self.attention(x, x, x, key_padding_mask=padding, attn_mask=later)
        return self.out(y.sum(1)) * weights[:, 0].square().sum(1, keepdim=True)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, memory):
        y, _ = self.attention(x, memory, memory)
        return self.out(y.sum(1))


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


class RelativePositions(nn.Module):
    """A table of relative positions as the mask of fused attention (Swin 2, T5)."""

    def __init__(self, grouped=False):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(4, 8), nn.Linear(4, 8 if grouped else 16), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(7, 4))
        self.grouped = grouped
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def forward(self, x):
        bias = self.table[self.index.view(-1)].view(4, 4, 4).permute(2, 0, 1).unsqueeze(0)
        q = self.q(x).unflatten(2, (4, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, -1, 2)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def traced_without_gradients(module, inputs):
    with torch.no_grad():
        return torch.jit.trace(module, inputs, check_trace=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_fast_path_of_attention(padded, causal):
    module, inputs = build(lambda: FastAttention(padded, causal), (N, T, 4))
    script = traced_without_gradients(module, inputs)
    assert "aten::_native_multi_head_attention" in str(script.inlined_graph)
    check(module, inputs, script)


def test_the_fast_path_of_cross_attention():
    module, inputs = build(CrossAttention, (N, 2, 4), (N, T, 4))
    check(module, inputs, traced_without_gradients(module, inputs))


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_the_fast_path_of_an_encoder(options):
    module, inputs = build(lambda: Encoder(**options), (N, T, 4))
    script = traced_without_gradients(module, inputs)
    assert "aten::_transformer_encoder_layer_fwd" in str(script.inlined_graph)
    check(module, inputs, script)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_parameter_as_the_mask_of_attention(grouped):
    module, inputs = build(lambda: RelativePositions(grouped), (N, T, 4))
    check(module, inputs, traced(module, inputs))


def test_fused_and_opened_agree_on_masks_of_every_kind():
    torch.manual_seed(0)
    x = torch.randn(N, T, 4, dtype=torch.float64)
    parameters = [torch.randn(s, dtype=torch.float64) for s in ((12, 4), (12,), (4, 4), (4,))]
    overload = torch.ops.aten._native_multi_head_attention.default
    masks = [(None, None), (torch.rand(T, T) > 0.6, 0), (torch.rand(N, T) > 0.6, 1), (torch.rand(N, 2, T, T) > 0.6, 2)]
    for mask, kind in masks:
        if mask is not None:
            mask[..., 0] = False  # a key for everyone
        for average in (True, False):
            arguments = (x, x, x, 4, 2, *parameters, mask, True, average, kind)
            call = OperatorCall("_native_multi_head_attention", overload, 13, (), (), (), (), "")
            opened = OPENINGS[call.name](Elementary(Tape(), call, [x]), arguments)
            for own, fused in zip(opened, overload(*arguments), strict=True):
                torch.testing.assert_close(own, fused, rtol=1e-12, atol=1e-14)


class WrittenOut(nn.Module):
    """An LSTM in linear layers, for a reference that hooks modules."""

    def __init__(self, rnn, out):
        super().__init__()
        self.i, self.h, self.out = nn.Linear(3, 16), nn.Linear(4, 16), out
        self.i.weight, self.i.bias = rnn.weight_ih_l0, rnn.bias_ih_l0
        self.h.weight, self.h.bias = rnn.weight_hh_l0, rnn.bias_hh_l0

    def forward(self, x):
        gates = self.i(x)
        h = c = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.size(1)):
            i, f, g, o = (gates[:, t] + self.h(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kronecker_factors_count_steps_as_positions(approximation):
    module, inputs = build(LastStep, (N, T, 3))
    targets = torch.tensor([0, 2, 1])
    reference = Reference(WrittenOut(module.rnn, module.out), inputs, targets, "cross_entropy", "mean")
    request = {"name": "kflr", "options": {"approximation": approximation, "strict": True}}
    result = engine.analyze(torch.jit.script(module), inputs, targets, [request])["kflr"]
    expected = reference.kflr(approximation)
    for own, theirs in (
        ("rnn.weight_ih_l0", "i.weight"),
        ("rnn.weight_hh_l0", "h.weight"),
        ("rnn.bias_hh_l0", "h.bias"),
    ):
        B, A = expected[theirs]
        torch.testing.assert_close(result[own].B, B, rtol=1e-10, atol=1e-13)
        if A is not None:
            torch.testing.assert_close(result[own].A, A, rtol=1e-10, atol=1e-13)
