"""What number formats hold."""

import pytest
import torch

from curvature_engine.precision import all_finite

INFINITE = float("inf")
FINITE = {
    "ordinary": torch.linspace(-1, 1, 9),
    "a sum that overflows": torch.full((4,), 3e38),
    "a sum that overflows in half precision": torch.full((9,), 6e4, dtype=torch.float16),
    "empty": torch.empty(0, 3),
    "whole numbers": torch.arange(4),
}
OTHERS = {
    "infinite": [1.0, INFINITE],
    "both infinities": [INFINITE, -INFINITE, 0.0],
    "not a number": [float("nan"), 1.0],
}


@pytest.mark.parametrize("name", FINITE)
def test_finite_numbers(name):
    assert all_finite(FINITE[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_one_that_is_not_finite_is_seen(name, dtype):
    assert not all_finite(torch.tensor(OTHERS[name], dtype=dtype))
