"""Gradients of batch normalisation's weights, made of few samples at a time."""

import pytest
import torch

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
