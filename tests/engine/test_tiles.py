"""Large convolutions' gradients, made tile by tile."""

import pytest
import torch
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import reductions, tiles
from curvature_engine.column_squares import ColumnSquares
from curvature_engine.reductions import Reduction, Spread, SumSquared
from curvature_engine.tiles import pay, reduce_tiles

EXTENSIONS = ["sum_grad_squared", "variance", "batch_l2", "diag_ggn_exact"]


class Kept(Reduction):
    """What it is shown."""

    def __init__(self):
        self.shown = []

    def add(self, first, piece, gradients):
        self.shown += [(first + n, piece, gradient.clone()) for n, gradient in enumerate(gradients)]

    def result(self, assemble):
        return None


@pytest.mark.parametrize(("a", "b"), [(3, 4), (300, 700), (700, 300), (1400, 1024), (1, 200_000), (2, 800_000)])
def test_tiles_are_the_products_rows(a, b):
    left, right = torch.randn(5, 2, a, dtype=torch.float64), torch.randn(5, 2, b, dtype=torch.float64)
    kept, squares, moments = Kept(), SumSquared(), Spread()
    reduce_tiles(7, [(left, right), (2 * left, right)], [kept, squares, moments])
    order = [number for _, number, _ in kept.shown]
    assert order == sorted(order), "every tile of all samples comes before the next"
    assert [sample for sample, _, _ in kept.shown] == [7, 8, 9, 10, 11] * (order[-1] + 1)
    per_piece = (order[-1] + 1) // 2
    assert per_piece == {(1400, 1024): 3, (2, 800_000): 2}.get((a, b), 1)
    whole = torch.cat([left.mT @ right, 2 * left.mT @ right], 1)  # one piece below the other
    found = torch.stack([torch.cat([tile for n, _, tile in kept.shown if n == sample]) for sample in range(7, 12)])
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(squares.pieces), whole.square().sum(0), rtol=1e-12, atol=1e-12)
    mean, spread = moments.result(torch.cat)
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spread, (whole - whole.mean(0)).square().sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile_bytes", [2**17, 2**22])
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(40, 100, 7, padding=3),
        nn.Conv2d(30, 90, 7, stride=2, padding=3, bias=False),
        nn.Conv2d(320, 460, 1),
        nn.Conv1d(40, 600, 7),
    ],
    ids=["rows of the kernel", "strided", "one by one", "1-d"],
)
def test_large_convolutions(monkeypatch, convolution, tile_bytes):
    monkeypatch.setattr(tiles, "_TILE_BYTES", tile_bytes)
    torch.manual_seed(0)
    space = (9,) if isinstance(convolution, nn.Conv1d) else (4, 5)
    net = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    inputs, targets = torch.randn(6, convolution.in_channels, *space, dtype=torch.float64), torch.arange(6) % 3
    net(inputs)
    assert pay(convolution.weight)
    compare(net, inputs, targets)


@pytest.mark.parametrize("sizes", [(900, 200), (200, 900), (450, 450)])
def test_large_layers_shared_by_positions(monkeypatch, sizes):
    monkeypatch.setattr(tiles, "_TILE_BYTES", 2**19)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Flatten(), nn.Linear(3 * sizes[1], 3)).double()
    assert pay(net[0].weight)
    compare(net, torch.randn(6, 3, sizes[0], dtype=torch.float64), torch.arange(6) % 3)


def compare(net, inputs, targets):
    """Each of the quantities, with brute force; results lie in order, however they were made."""
    analysis = engine.analyze(torch.jit.script(net), inputs, targets, EXTENSIONS, verify=True)
    reference = Reference(net, (inputs,), targets, "cross_entropy", "mean")
    for name in EXTENSIONS:
        for parameter, expected in reference.expected(name).items():
            error = (analysis[name][parameter] - expected).abs().max() / expected.abs().max()
            assert error < 1e-10, (name, parameter)
            assert analysis[name][parameter].is_contiguous(), (name, parameter)


def test_memory_that_runs_out_halves_what_is_unfolded(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(40, 100, 7, padding=3), nn.Flatten(), nn.Linear(2000, 3)).double()
    inputs, targets = torch.randn(6, 40, 4, 5, dtype=torch.float64), torch.arange(6) % 3
    program = engine.load(torch.jit.script(net))
    expected = engine.analyze(program, inputs, targets, ["variance"])
    from curvature_engine.rules.convolution import DirectConvolutionRule as Rule

    seen, unfold = [], Rule.unfold

    def failing(self, role, saved):
        if role == "weight":
            seen.append(len(saved[0]))
            if len(saved[0]) > 2:
                raise MemoryError("not enough memory")
        return unfold(self, role, saved)

    monkeypatch.setattr(Rule, "unfold", failing)
    found = engine.analyze(program, inputs, targets, ["variance"])
    assert max(seen) > 2 >= seen[-1]
    for name, tensor in expected["variance"].items():
        torch.testing.assert_close(found["variance"][name], tensor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("failing", [2, 5, 9])
def test_memory_that_runs_out_between_columns_counts_nothing_twice(monkeypatch, failing):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(8 * 9 * 9, 5)).double()
    inputs, targets = torch.randn(6, 8, 11, 11, dtype=torch.float64), torch.arange(6) % 5
    program = engine.load(torch.jit.script(net))
    expected = engine.analyze(program, inputs, targets, ["diag_ggn_exact"])["diag_ggn_exact"]
    calls, add = [], reductions.add_squares

    def short(total, gradients):
        calls.append(len(gradients))
        if len(calls) == failing:
            raise MemoryError("not enough memory")
        add(total, gradients)

    monkeypatch.setattr(reductions, "add_squares", short)
    found = engine.analyze(program, inputs, targets, ["diag_ggn_exact"])["diag_ggn_exact"]
    assert len(calls) > 4 * 3, "four columns, each in three pieces, some of which came before what failed"
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("failing", [1, 2])
def test_memory_that_runs_out_amid_several_columns_counts_nothing_twice(monkeypatch, failing):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 9), nn.Flatten()).double()
    inputs, targets = torch.randn(6, 8, 11, 11, dtype=torch.float64), torch.arange(6) % 5
    program = engine.load(torch.jit.script(net))
    expected = engine.analyze(program, inputs, targets, ["diag_ggn_exact"])["diag_ggn_exact"]
    calls, add = [], ColumnSquares._add_piece

    def short(self, piece, pairs):
        calls.append(len(pairs))
        add(self, piece, pairs)
        if len(calls) == failing:
            raise MemoryError("not enough memory")

    monkeypatch.setattr(ColumnSquares, "_add_piece", short)
    found = engine.analyze(program, inputs, targets, ["diag_ggn_exact"])["diag_ggn_exact"]
    assert len(calls) > failing
    assert max(calls) == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_variance_of_many_samples(offset):
    """Where gradients hardly differ from their mean, the difference of two sums is not taken."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(30, 100, 7, padding=3), nn.Flatten(), nn.Linear(2000, 1)).double()
    inputs = offset + torch.randn(20, 30, 4, 5, dtype=torch.float64)
    targets = net(inputs).detach() - offset - torch.randn(20, 1, dtype=torch.float64)
    found = engine.analyze(torch.jit.script(net), inputs, targets, ["variance", "batch_grad"], loss="mse")
    alone = engine.analyze(torch.jit.script(net), inputs, targets, ["variance"], loss="mse")["variance"]
    for name, gradients in found["batch_grad"].items():
        expected = ((gradients - gradients.mean(0)) ** 2).mean(0)
        assert (alone[name] - expected).abs().max() < 1e-11 * expected.abs().max(), name
    share = found["batch_grad"]["0.weight"].var(0, correction=0) / found["batch_grad"]["0.weight"].square().mean(0)
    assert bool((share < 2**-5).any()) == bool(offset)
