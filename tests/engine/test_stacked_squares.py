"""Squares of several columns' gradients by few products, as on accelerators: the same sums as column by column."""

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_engine import reductions, stacked_squares
from curvature_engine.extensions import squared_columns
from curvature_engine.rules import convolution


class Rows(nn.Module):
    """Linear layers on several rows, one of them with its inputs first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 5))
        self.last = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((torch.tanh(self.first(x)) @ self.second).relu().sum(1))


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 18, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(18, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 7)),
    )


NETS = {"convolutions": (convolutions, (3, 8, 8)), "rows": (Rows, (5, 4))}


@pytest.fixture
def everywhere(monkeypatch):
    """As if a CPU were an accelerator."""
    monkeypatch.setattr(stacked_squares, "_WITHOUT", set())
    stacked = []

    def seen(columns):
        stacked.append(len(columns))
        return stacked_squares.stacked_squares(columns)

    monkeypatch.setattr(squared_columns, "stacked_squares", seen)
    return stacked


@pytest.mark.parametrize("budget", [None, 2**16])
@pytest.mark.parametrize("net", NETS)
def test_sums_are_those_of_columns_by_themselves(net, budget, everywhere, monkeypatch):
    make, shape = NETS[net]
    torch.manual_seed(0)
    module = make().double().eval()
    x, y = torch.randn(5, *shape, dtype=torch.float64), torch.randint(0, 7, (5,))
    requests = ["diag_ggn_exact", {"name": "diag_ggn_mc", "options": {"mc_samples": 4}}]
    found = engine.analyze(torch.jit.script(module), x, y, requests, budget_bytes=budget)
    assert budget is not None or (everywhere and max(everywhere) == 6)
    monkeypatch.setattr(stacked_squares, "_WITHOUT", {"cpu"})
    expected = engine.analyze(torch.jit.script(module), x, y, requests, budget_bytes=budget)
    for label in expected:
        for name, value in expected[label].items():
            torch.testing.assert_close(found[label][name], value, rtol=1e-11, atol=1e-14)


def test_a_plan_counts_what_waits(everywhere, monkeypatch):
    torch.manual_seed(0)
    module = torch.jit.script(convolutions().eval())
    x, y = torch.randn(5, 3, 8, 8), torch.randint(0, 7, (5,))
    stacking = engine.plan(module, x, y, ["diag_ggn_exact"])
    monkeypatch.setattr(stacked_squares, "_WITHOUT", {"cpu"})
    monkeypatch.setattr(squared_columns.position_pairs, "pay", lambda *args: False)
    alone = engine.plan(module, x, y, ["diag_ggn_exact"])
    assert stacking.peak_bytes > alone.peak_bytes
    assert {p.form for p in stacking.requests[0].parameters} == {p.form for p in alone.requests[0].parameters}


def test_squares_of_first_axes_are_the_same_in_one_pass():
    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    x = torch.randn(3, 4, 5, dtype=torch.float64)
    found = reductions.squares_of_first(x.as_subclass(Elsewhere), 2).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, reductions.squares_of_first(x, 2))
    gradients = torch.randn(6, 3, dtype=torch.float64)
    here, there = reductions.Spread(), reductions.Spread()
    for block in gradients.split(2):
        here.add(0, 0, block)
        there.add(0, 0, block.as_subclass(Elsewhere))
    for a, b in zip(here.result(reductions_only), there.result(reductions_only), strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor))


def reductions_only(pieces):
    return pieces[0]


@pytest.fixture
def by_rows(monkeypatch):
    """Windows as accelerators unfold them, however narrow."""
    monkeypatch.setattr(convolution, "_CACHING", set())
    monkeypatch.setattr(convolution, "_LEAST_WIDTH", 1)


LAYERS = {
    "1d": (nn.Conv1d(2, 3, 4, stride=3, padding=2, dilation=2), (2, 17)),
    "2d": (nn.Conv2d(3, 4, (3, 2), padding=1), (3, 6, 5)),
    "strided": (nn.Conv2d(3, 4, 3, stride=(2, 3), padding=(2, 1)), (3, 8, 9)),
    "dilated": (nn.Conv2d(3, 4, (3, 2), stride=(3, 1), dilation=(2, 3), padding=(1, 2)), (3, 11, 6)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 5, 6)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 2), stride=(2, 1, 2), padding=(1, 0, 1)), (2, 4, 5, 4)),
    "no padding": (nn.Conv2d(3, 4, (5, 1)), (3, 5, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS)
def test_windows_by_rows_give_the_same_gradients(layer, by_rows, monkeypatch):
    torch.manual_seed(0)
    convolution_layer, shape = LAYERS[layer]
    x = torch.randn(4, *shape, dtype=torch.float64)
    convolved = convolution_layer.double()
    features = convolved(x).flatten(1).shape[1]
    module = torch.jit.script(nn.Sequential(convolved, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3).double()).eval())
    requests = ["sum_grad_squared", "variance", "diag_ggn_exact", "batch_l2", "batch_grad"]
    y = torch.tensor([0, 1, 2, 1])
    found = engine.analyze(module, x, y, requests)
    monkeypatch.setattr(convolution, "_CACHING", {"cpu"})
    expected = engine.analyze(module, x, y, requests)
    for label in requests:
        for name, value in expected[label].items():
            torch.testing.assert_close(found[label][name], value, rtol=1e-11, atol=1e-14)
