"""Norms of convolutions' gradients from correlations of places."""

import pytest
import torch
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine.rules import patch_norms

CONVOLUTIONS = {
    "padded": (nn.Conv2d(8, 12, 3, padding=1), (4, 5)),
    "valid": (nn.Conv2d(8, 12, 3, bias=False), (5, 4)),
    "strided": (nn.Conv2d(8, 12, 3, stride=(2, 1), padding=(1, 0)), (7, 5)),
    "dilated": (nn.Conv2d(8, 12, (2, 3), dilation=(3, 1), padding=2), (5, 3)),
    "same": (nn.Conv2d(8, 12, (4, 3), padding="same", dilation=(1, 2)), (4, 5)),
    "of one place": (nn.Conv2d(8, 12, 1, stride=2), (5, 4)),
    "of one position": (nn.Conv2d(8, 12, (4, 3)), (4, 3)),
    "signal": (nn.Conv1d(8, 12, 3, stride=2, padding=1), (9,)),
    "volume": (nn.Conv3d(8, 12, 2, padding=1), (2, 1, 2)),
}


@pytest.fixture
def used(monkeypatch):
    """The calls, which are made whatever they cost."""
    calls, original = [], patch_norms.squared_norms

    def counted(*arguments):
        calls.append(original(*arguments))
        return calls[-1]

    monkeypatch.setattr(patch_norms, "squared_norms", counted)
    monkeypatch.setattr(patch_norms, "_LEAST_GAIN", float("inf"))
    return calls


@pytest.mark.parametrize("limit", [1, 2**22], ids=["one by one", "together"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_equal_brute_force(name, limit, used, monkeypatch):
    monkeypatch.setattr(patch_norms, "_CACHED_BYTES", limit)
    torch.manual_seed(0)
    convolution, space = CONVOLUTIONS[name]
    net = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    inputs, targets = torch.randn(5, 8, *space, dtype=torch.float64), torch.arange(5) % 3
    net(inputs)
    found = engine.analyze(torch.jit.script(net), inputs, targets, ["batch_l2"])["batch_l2"]
    assert len(used) == 1
    assert used[0] is not None
    for parameter, expected in Reference(net, (inputs,), targets, "cross_entropy", "mean").expected("batch_l2").items():
        torch.testing.assert_close(found[parameter], expected, rtol=1e-12, atol=0, msg=parameter)


def test_channels_last(used):
    """In single precision, where images lie so."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 20, 3))
    inputs, targets = torch.randn(5, 8, 4, 5), torch.arange(5) % 3
    found = engine.analyze(torch.jit.script(net), inputs, targets, ["batch_l2"])["batch_l2"]["0.weight"]
    assert len(used) == 1
    gradients = engine.analyze(torch.jit.script(net), inputs, targets, ["batch_grad"])["batch_grad"]["0.weight"]
    torch.testing.assert_close(found, gradients.flatten(1).square().sum(1), rtol=1e-6, atol=0)


def test_gradients_whose_parts_cancel_are_made(used):
    """Where the same is seen at all positions, and their gradients all but cancel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Flatten(), nn.Linear(12 * 16, 3))
    with torch.no_grad():
        net[2].weight.view(3, 12, 16)[..., 8:] = -net[2].weight.view(3, 12, 16)[..., :8]
        net[2].weight.view(3, 12, 16)[..., 0] += 1e-3 * torch.randn(3, 12)
    inputs, targets = torch.randn(5, 8, 1, 1).expand(5, 8, 4, 4).contiguous(), torch.arange(5) % 3
    found = engine.analyze(torch.jit.script(net), inputs, targets, ["batch_l2"])["batch_l2"]["0.weight"]
    assert used == [None]
    net, inputs = net.double(), inputs.double()
    expected = Reference(net, (inputs,), targets, "cross_entropy", "mean").expected("batch_l2")["0.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("channels", "space", "pays"),
    [
        ((256, 256), (8, 8), True),
        ((512, 512), (4, 4), True),
        ((3, 64), (28, 28), False),
        ((4096, 4096), (32, 32), True),
        ((4096, 4096), (64, 64), False),  # cheaper, but for memory
    ],
)
def test_few_positions_of_many_channels_pay(channels, space, pays):
    x, g = (torch.empty(1).expand(2, c, *space) for c in channels)
    assert patch_norms.pay(x, g, 9) == pays


def test_the_plan_says_so():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 16, 3))
    plan = engine.plan(torch.jit.script(net), torch.randn(5, 64, 4, 4), torch.arange(5) % 3, ["batch_l2"])
    forms = {p.parameter: p.form for p in plan.requests[0].parameters}
    assert forms["0.weight"] == "gram"
