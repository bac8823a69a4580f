"""Models for which individual quantities do not exist, or that are more than a function: refused, with the reason."""

import torch
import torch.nn.functional as F
from tests.engine.zoo.entry import CLASSES, Entry, sequences, tokens, vectors
from torch import nn


class BatchStatistics(nn.Module):
    """Each sample minus the batch's mean."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.a(x)
        return self.out(torch.tanh(h - h.mean(0)))


class AcrossTheBatch(nn.Module):
    """Attention among samples."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        q = self.q(x)
        return self.out((q @ q.t()).softmax(1) @ self.v(x))


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.a(x))))


class BatchNormWithoutStatistics(nn.Module):
    """No running statistics: the batch's in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.a(x))))


class MaxNorm(nn.Module):
    """Scripting drops max_norm (TorchScript's graph has a plain embedding); a trace holds it."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, CLASSES)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


class ScaledByFrequency(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4, scale_grad_by_freq=True), nn.Linear(4, CLASSES)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


class Dropped(nn.Module):
    """A trace made in training mode has its dropout baked in."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(F.dropout(self.a(x), 0.5, training=True))


class Noise(nn.Module):
    """Random numbers in the forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.a(x) + torch.randn_like(x))


class EditsItself(nn.Module):
    """Weights kept at norm one inside the forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.div_(self.a.weight.norm())
        return self.out(self.a(x))


class Straight(torch.autograd.Function):
    """A step whose gradient is said to be one."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class CustomGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(Straight.apply(self.a(x)))


class SequenceFirst(nn.Module):
    """Outputs with the batch second: the first axis holds no samples."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(x).transpose(0, 1).cumsum(0).cumsum(1)[:, :, :]


class Ranked(nn.Module):
    """Each sample's place among the others, softly."""

    def __init__(self):
        super().__init__()
        self.score, self.out = nn.Linear(4, 1), nn.Linear(1, CLASSES)

    def forward(self, x):
        s = self.score(x)
        return self.out(torch.sigmoid(s - s.t()).sum(1, keepdim=True))


ENTRIES = [
    Entry("batch statistics by hand", BatchStatistics, vectors(), refused="coupled_samples"),
    Entry("attention across the batch", AcrossTheBatch, vectors(), refused="coupled_samples"),
    Entry("samples ranked among each other", Ranked, vectors(), refused="coupled_samples"),
    Entry("batch norm in training mode", BatchNorm, vectors(), ways=("traced",), refused="training_mode", train=True),
    Entry("batch norm without statistics", BatchNormWithoutStatistics, vectors(), refused="training_mode"),
    Entry("embedding with max_norm", MaxNorm, tokens(), refused="unsupported_operator", ways=("traced",)),
    Entry("embedding scaled by frequency", ScaledByFrequency, tokens(), refused="unsupported_operator"),
    Entry("dropout that stays on", Dropped, vectors(), refused="training_mode"),
    Entry("noise in the forward pass", Noise, vectors(), refused="unsupported_operator"),
    Entry("weights edited in the forward pass", EditsItself, vectors(), refused="unsupported_model",
          ways=("scripted", "traced")),
    Entry("custom gradient", CustomGradient, vectors(), ways=("traced",), refused="unsupported_model"),
    Entry("running sums over the batch", SequenceFirst, sequences(), refused="coupled_samples", loss="mse"),
]  # fmt: skip
