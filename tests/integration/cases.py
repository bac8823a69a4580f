"""Small models and batches, and one job that takes a while."""

import torch
from torch import nn


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return net.eval(), (torch.randn(6, 5), torch.randint(0, 3, (6,)))


def long_running():
    """Thousands of columns: minutes of work, which tests cut short."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 20_000)).eval()
    return net, (torch.randn(64, 64), torch.randn(64, 20_000))


LONG = {"extensions": ["diag_ggn_exact"], "loss": "mse"}
