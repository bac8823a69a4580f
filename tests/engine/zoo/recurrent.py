"""Recurrent networks: fused layers, cells, packed sequences, attention over states, sequence to sequence."""

import torch
import torch.nn.functional as F
from tests.engine.zoo.entry import CLASSES, Entry, sequences, together, tokens
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Classifier(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **options)
        width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


class Tagger(nn.Module):
    """Both directions on words, tags for every one."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(6, 4), nn.LSTM(4, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, ids):
        return self.out(self.rnn(self.embed(ids))[0]).transpose(1, 2)


class LanguageModel(nn.Module):
    """Sequence first, the states of all layers, output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(6, 3), nn.LSTM(3, 3, num_layers=2)
        self.out = nn.Linear(3, 6)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids.t())
        h = torch.zeros(2, ids.size(0), 3, dtype=x.dtype)
        y, _ = self.rnn(x, (h, h))
        return self.out(y).permute(1, 2, 0)


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(4, 3, batch_first=True, bidirectional=True), nn.Linear(6, CLASSES)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(y.sum(1) / lengths[:, None])


class Seq2Seq(nn.Module):
    """A GRU reads, a cell writes with attention over what was read."""

    def __init__(self):
        super().__init__()
        self.encoder, self.cell = nn.GRU(4, 3, batch_first=True), nn.GRUCell(6, 3)
        self.query, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, CLASSES)

    def forward(self, x):
        memory, state = self.encoder(x)
        h, y = state[0], torch.zeros(x.size(0), 3, dtype=x.dtype)
        outputs = []
        for _ in range(2):
            weights = (memory @ self.query(h).unsqueeze(2)).softmax(1)
            context = (weights * memory).sum(1)
            h = self.cell(torch.cat([y, context], 1), h)
            y = self.out(h)
            outputs.append(y)
        return torch.stack(outputs, 2)


class LearnedStart(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.h = nn.RNN(4, 3, batch_first=True), nn.Parameter(torch.randn(1, 1, 3))
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.out(self.rnn(x, self.h.repeat(1, x.size(0), 1))[0][:, -1])


class ConvolutionalLstm(nn.Module):
    """Shi et al. 2015: gates by convolution."""

    def __init__(self):
        super().__init__()
        self.gates, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(2, CLASSES)

    def forward(self, x):
        n, steps, h, w = x.shape
        state, cell = torch.zeros(n, 2, h, w, dtype=x.dtype), torch.zeros(n, 2, h, w, dtype=x.dtype)
        for t in range(steps):
            i, f, g, o = self.gates(torch.cat([x[:, t : t + 1], state], 1)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
        return self.out(state.mean((2, 3)))


class StateSpace(nn.Module):
    """A diagonal linear recurrence with learned rates (S4D, Mamba's core)."""

    def __init__(self):
        super().__init__()
        self.log_rate, self.step = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4))
        self.b, self.c = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))
        self.skip, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        decay = torch.exp(-torch.exp(self.log_rate) * F.softplus(self.step)[:, None])
        state = torch.zeros(x.size(0), 4, 2, dtype=x.dtype)
        y = torch.zeros_like(x[:, 0])
        for t in range(x.size(1)):
            state = state * decay + x[:, t, :, None] * self.b
            y = y + (state * self.c).sum(-1) + x[:, t] * self.skip
        return self.out(torch.tanh(y))


def lengths():
    return (torch.tensor([2, 4, 3]),)


ENTRIES = [
    Entry("LSTM", lambda: Classifier(nn.LSTM), sequences()),
    Entry("LSTM, two layers, both directions", lambda: Classifier(nn.LSTM, num_layers=2, bidirectional=True),
          sequences(3)),
    Entry("LSTM with projections", lambda: Classifier(nn.LSTM, proj_size=2), sequences()),
    Entry("GRU, both directions", lambda: Classifier(nn.GRU, bidirectional=True), sequences(3)),
    Entry("RNN, relu, no biases", lambda: Classifier(nn.RNN, nonlinearity="relu", bias=False), sequences()),
    Entry("tagger", Tagger, tokens()),
    Entry("LSTM language model, tied", LanguageModel, tokens(3)),
    Entry("LSTM on packed sequences", lambda: Packed(nn.LSTM), together(sequences(), lengths), ways=("traced",)),
    Entry("GRU on packed sequences", lambda: Packed(nn.GRU), together(sequences(), lengths), ways=("traced",)),
    Entry("sequence to sequence with attention", Seq2Seq, sequences(3)),
    Entry("RNN with a learned start", LearnedStart, sequences()),
    Entry("convolutional LSTM", ConvolutionalLstm, lambda: (torch.randn(3, 2, 3, 3, dtype=torch.float64),)),
    Entry("state space", StateSpace, sequences(3)),
]  # fmt: skip
