"""Gradients of batch normalisation's weights, made of few samples at a time."""

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_engine import streaming
from curvature_engine.rules.normalization import FrozenNormRule

SAMPLES, TIMES, CHANNELS, SPACE = 5, 2, 6, (70, 90)
"""Of which no more than three samples are normalised at a time."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_parts_are_the_whole(dtype, last):
    torch.manual_seed(0)
    images = torch.randn(SAMPLES * TIMES, CHANNELS, *SPACE).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    x = images.view(SAMPLES, TIMES, CHANNELS, *SPACE)
    g = torch.randn_like(x, dtype=torch.promote_types(dtype, torch.float32))
    mean, variance = torch.randn(CHANNELS, dtype=g.dtype), torch.rand(CHANNELS, dtype=g.dtype) + 0.1
    rule = FrozenNormRule(mean, variance, 1e-5, len(SPACE))
    with torch.no_grad():
        found = rule.per_sample("weight", (x,), g)
    whole = torch.nn.functional.batch_norm(images.double(), mean.double(), variance.double())
    expected = (whole.view(x.shape) * g.double()).sum((1, 3, 4))
    assert found.dtype == g.dtype
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_parts_can_be_differentiated():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 1, 3, 5, dtype=torch.float64)
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    rule = FrozenNormRule(mean, variance, 1e-5, 1)
    torch.autograd.gradcheck(lambda t: rule.per_sample("weight", (t,), g), (x,))


@pytest.mark.parametrize("least", [0, 2**40], ids=["as they arrive", "when all have"])
@pytest.mark.parametrize("others", [["diag_ggn_mc"], ["variance"], ["batch_grad", "diag_ggn_exact"]], ids="+".join)
def test_a_gradient_is_the_sum_of_the_samples_own(monkeypatch, others, least):
    """Which costs less there than autograd's, where individual gradients can be made anyway."""
    monkeypatch.setattr(streaming, "LEAST_BYTES", least)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    nn.init.uniform_(net[1].running_mean)
    inputs, targets = torch.randn(5, 2, 6, 6), torch.arange(5) % 3
    program = engine.load(torch.jit.script(net))
    made, per_sample = [], FrozenNormRule.per_sample

    def counted(self, role, saved, g):
        made.append(role)
        return per_sample(self, role, saved, g)

    monkeypatch.setattr(FrozenNormRule, "per_sample", counted)
    before = 0
    for _ in range(2):  # the first has to ask which row is which sample's
        before = -len(made)
        engine.analyze(program, inputs, targets, others)
        before += len(made)
    made.clear()
    found = engine.analyze(program, inputs, targets, ["grad", *others])["grad"]
    if others == ["diag_ggn_mc"]:
        assert len(made) == before + 2, "a weight's and a bias's of the loss's gradient beside the column's"
    for name, parameter in net.named_parameters():
        (expected,) = torch.autograd.grad(nn.CrossEntropyLoss()(net(inputs), targets), [parameter])
        torch.testing.assert_close(found[name], expected, rtol=2e-5, atol=1e-6)
        assert found[name].shape == parameter.shape
