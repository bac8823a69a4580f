"""Kronecker factors where rows are irregular: silent rows, unequal numbers of positions, several uses.

A counts every row that the layer sees; a row that no gradient reaches has no known sample, and a factor that would
need it is absent with the reason.
"""

import pytest
import torch
from torch import nn

import curvature_engine as engine

APPROXIMATIONS = ["expand", "reduce", "backpack"]


def factors(module, x, *, way="scripted", parameter="l.weight"):
    module = module.double().eval()
    script = torch.jit.script(module) if way == "scripted" else torch.jit.trace(module, x, check_trace=False)
    requests = [{"name": "kflr", "label": a, "options": {"approximation": a}} for a in APPROXIMATIONS]
    targets = torch.zeros(module(x).shape, dtype=torch.float64)
    result = engine.analyze(script, x, targets, requests, loss="mse", reduction="sum")
    return {a: result[a].get(parameter) for a in APPROXIMATIONS}, {a: result.groups[a].missing for a in APPROXIMATIONS}


class LastToken(nn.Module):
    """Only the last position of each sample reaches the outputs, although the layer sees all."""

    def __init__(self, first=False):
        super().__init__()
        self.l, self.first = nn.Linear(3, 2), first

    def forward(self, x):
        if self.first:
            return self.l(x.transpose(0, 1))[-1]
        return self.l(x)[:, -1]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("samples", "positions"), [(4, 6), (5, 2), (3, 3)])
def test_silent_rows_count_among_the_inputs(samples, positions, first):
    x = torch.randn(samples, positions, 3, dtype=torch.float64)
    found, missing = factors(LastToken(first), x)
    pooled, mean = x.flatten(0, 1), x.mean(1)
    torch.testing.assert_close(found["expand"].A, pooled.T @ pooled / len(pooled))
    torch.testing.assert_close(found["backpack"].A, pooled.T @ pooled / samples)
    if found["reduce"] is None:
        assert "no gradient reaches some rows" in missing["reduce"]["l.weight"]
    else:
        torch.testing.assert_close(found["reduce"].A, mean.T @ mean / samples)


def test_the_average_needs_the_order_of_silent_rows():
    # With two samples and three positions the living rows 2 and 5 fit [N, T] and [T, N] alike.
    found, missing = factors(LastToken(), torch.randn(2, 3, 3, dtype=torch.float64))
    assert found["reduce"] is None
    assert "no gradient reaches some rows" in missing["reduce"]["l.weight"]
    assert found["expand"] is not None


class Picked(nn.Module):
    """The layer sees only the positions that a mask keeps."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        keep = x[:, :, 0] > 0
        h = torch.zeros(x.shape[0], x.shape[1], 2, dtype=x.dtype)
        h[keep] = self.l(x[keep])
        return h.sum(1)


def test_unequal_numbers_of_positions_have_no_average():
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    x[:, :, 0] = torch.tensor([[1, -1, -1, -1], [1, 1, 1, -1], [1, 1, -1, -1]])
    rows = x[x[:, :, 0] > 0]
    found, missing = factors(Picked(), x)
    torch.testing.assert_close(found["expand"].A, rows.T @ rows / 6)
    torch.testing.assert_close(found["expand"].B, 2.0 * torch.diag(torch.tensor([6.0, 6.0], dtype=torch.float64)))
    torch.testing.assert_close(found["backpack"].A, rows.T @ rows / 3)
    assert "different numbers of positions" in missing["reduce"]["l.weight"]
    assert found["reduce"] is None


def test_equal_numbers_of_picked_positions_have_one():
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    x[:, :, 0] = torch.tensor([[1, -1, 1, -1], [-1, 1, 1, -1], [1, 1, -1, -1]])
    means = torch.stack([row[row[:, 0] > 0].mean(0) for row in x])
    found, _ = factors(Picked(), x)
    torch.testing.assert_close(found["reduce"].A, means.T @ means / 3)
    torch.testing.assert_close(found["reduce"].B, 2.0 * 3 * 4 * torch.eye(2, dtype=torch.float64))


class PickedAndSilent(Picked):
    def forward(self, x):
        keep = x[:, :, 0] > 0
        h = torch.zeros(x.shape[0], x.shape[1], 2, dtype=x.dtype)
        h[keep] = torch.relu(self.l(x[keep]))
        return h.sum(1)


def test_silent_rows_in_an_irregular_order_leave_no_factor():
    module = PickedAndSilent()
    nn.init.ones_(module.l.weight)
    nn.init.zeros_(module.l.bias)
    x = torch.ones(3, 4, 3, dtype=torch.float64)
    x[:, :, 0] = torch.tensor([[1, -1, -1, -1], [1, 1, 1, -1], [1, 1, -1, -1]])
    x[1, 1, 1:] = -9  # its ReLU is dead
    found, missing = factors(module, x)
    assert all(found[a] is None for a in APPROXIMATIONS)
    assert "no gradient reaches some rows" in missing["expand"]["l.weight"]


class Windows(nn.Module):
    """One layer on [windows · N, 2, C]: its leading axis is no sample axis."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        n, t, c = x.shape
        h = self.l(x.view(n, t // 2, 2, c).transpose(0, 1).reshape(-1, 2, c))
        return h.view(t // 2, n, 2, 2).transpose(0, 1).reshape(n, t, 2).sum(1)


def test_positions_are_told_from_samples_wherever_they_stand():
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    found, _ = factors(Windows(), x)
    mean, pooled = x.mean(1), x.flatten(0, 1)
    torch.testing.assert_close(found["reduce"].A, mean.T @ mean / 3)
    torch.testing.assert_close(found["reduce"].B, 2.0 * 3 * 16 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found["expand"].A, pooled.T @ pooled / 12)
    torch.testing.assert_close(found["expand"].B, 2.0 * 12 * torch.eye(2, dtype=torch.float64))


class Turned(nn.Module):
    """Samples change places, and the largest position alone reaches the outputs."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)

    def forward(self, x):
        return self.l(x).flip(0).amax(1)


def test_living_rows_that_happen_to_fit_an_order_do_not_place_silent_ones():
    # Rows 1 and 3 reach sample 1's outputs, 4 and 6 sample 0's: so they would if samples stood along the last axis.
    module = Turned()
    nn.init.eye_(module.l.weight)
    nn.init.zeros_(module.l.bias)
    x = torch.zeros(2, 4, 2, dtype=torch.float64)
    x[0, 1, 0] = x[0, 3, 1] = x[1, 0, 0] = x[1, 2, 1] = 1.0
    found, missing = factors(module, x)
    assert found["reduce"] is None
    assert "no gradient reaches some rows" in missing["reduce"]["l.weight"]


class ThereAndBack(nn.Module):
    """A square weight used plain and transposed: its rows are outputs of one layer and inputs of the other."""

    def __init__(self, back):
        super().__init__()
        self.l, self.back = nn.Linear(3, 3), back

    def forward(self, x):
        h = torch.tanh(self.l(x))
        if self.back == "transposed":
            return nn.functional.linear(h, self.l.weight.t())
        if self.back == "matmul":
            return h @ self.l.weight
        if self.back == "plain":
            return h @ self.l.weight.t()
        return nn.functional.conv_transpose1d(h[:, :, None], self.l.weight[:, :, None]).squeeze(2)


@pytest.mark.parametrize("back", ["transposed", "matmul", "convolution", "plain"])
def test_a_weight_used_in_both_directions_has_no_kronecker_form(back):
    found, missing = factors(ThereAndBack(back), torch.randn(4, 3, dtype=torch.float64))
    for approximation in APPROXIMATIONS:
        if back == "plain":
            assert found[approximation] is not None
        else:
            assert found[approximation] is None
            assert "tied across layers of different kinds" in missing[approximation]["l.weight"]


class Rectified(nn.Module):
    """A layer whose rows are all silent where its inputs are negative."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(torch.relu(self.l(x.flatten(0, 1))).unflatten(0, x.shape[:2]).sum(1))


def test_silent_rows_of_one_batch_do_not_take_factors_from_the_next():
    module = Rectified().double().eval()
    nn.init.ones_(module.l.weight)
    program = engine.load(torch.jit.script(module))
    silent, targets = -10 * torch.ones(3, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 0])
    request = [{"name": "kflr", "options": {"approximation": "reduce"}}]
    first = engine.analyze(program, silent, targets, request)
    assert "no gradient reaches some rows" in first.groups["kflr"].missing["l.weight"]
    then = engine.analyze(program, -silent, targets, request)
    alone = engine.analyze(torch.jit.script(module), -silent, targets, request)
    torch.testing.assert_close(then["kflr"]["l.weight"].A, alone["kflr"]["l.weight"].A)
    again = engine.analyze(program, silent, targets, request)
    torch.testing.assert_close(again["kflr"]["l.weight"].A, alone["kflr"]["l.weight"].A)
