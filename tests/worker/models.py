"""Models and batches of the worker's tests."""

import torch
from torch import nn


def small():
    """A model that takes a moment."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(N=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % 3


@torch.jit.script
def halved(outputs, targets):
    """A loss of one's own."""
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none") / 2.0


@torch.jit.script
def endless(outputs, targets):
    """A loss that does not end within a test."""
    for _ in range(1_000_000_000):
        outputs = outputs + 0.0
    return outputs.sum(1)


class Endless(nn.Module):
    """Many short operators: a loop that does not end within a test."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(1_000_000_000):
            x = x + 0.0
        return self.linear(x)


class LongOperator(nn.Module):
    """One operator of minutes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        a = torch.ones(12_000, 12_000)
        return self.linear(x) + torch.mm(a, a)[0, 0]


class Greedy(nn.Module):
    """Asks for 4 TB."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) + torch.ones(1_000_000, 1_000_000)[0, 0]


class Hungry(nn.Module):
    """Asks for 8 GiB."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) + torch.ones(65_536, 32_768)[0, 0]
