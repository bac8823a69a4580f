"""The caller's mode is nothing to an analysis."""

import pytest
import torch
from torch import nn

import curvature_engine as engine


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_those_of_any_mode(mode, loaded):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    y, requests = torch.tensor([0, 1, 2, 0]), ["grad", "batch_l2", "diag_ggn_exact", "diag_hessian", "kfac"]
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = engine.analyze(torch.jit.script(module), x, y, requests)
    with mode():
        model = torch.jit.script(module)
        model = engine.load(model) if loaded else model
        given = x * 1.0  # in inference mode, a tensor of its kind
        assert str(engine.plan(model, given, y, requests))
        found = engine.analyze(model, given, y, requests)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    for label in requests:
        for name, value in expected[label].items():
            pairs = zip(found[label][name], value, strict=True) if label == "kfac" else [(found[label][name], value)]
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
