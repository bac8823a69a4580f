"""Sums over what an embedding's samples picked, with and without reading from the device how many picked what."""

import pytest
import torch

from curvature_engine.rules import embedding
from curvature_engine.rules.embedding import EmbeddingRule


@pytest.fixture(params=["read", "unread"])
def places(request, monkeypatch):
    if request.param == "unread":
        monkeypatch.setattr(embedding, "_with_places", embedding._with_places_unread)


@pytest.mark.parametrize("padding", [-1, 0, 2])
@pytest.mark.parametrize("positions", [0, 1, 7])
def test_reductions_are_those_of_the_gradients(positions, padding, places):
    torch.manual_seed(0)
    rule = EmbeddingRule(2, 5, padding)
    indices, g = torch.randint(0, 5, (4, positions)), torch.randn(4, positions, 3, dtype=torch.float64)
    gradients = torch.zeros(4, 5, 3, dtype=torch.float64)
    for n in range(4):
        for t in range(positions):
            if indices[n, t] != padding:
                gradients[n, indices[n, t]] += g[n, t]
    saved = (indices,)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rule.per_sample("weight", saved, g), gradients, **close)
    torch.testing.assert_close(rule.sum_squared("weight", saved, g), gradients.square().sum(0), **close)
    torch.testing.assert_close(rule.squared_norms("weight", saved, g), gradients.square().sum((1, 2)), **close)
    mean, spread = rule.moments("weight", saved, g)
    torch.testing.assert_close(mean, gradients.mean(0), **close)
    torch.testing.assert_close(spread, (gradients - gradients.mean(0)).square().sum(0), **close)
