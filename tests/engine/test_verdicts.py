"""What the probe found on one batch must not decide another batch's rows."""

import pytest
import torch
from tests.engine.models import N as SAMPLES
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine.probe import Verdict, Verdicts

EXTENSIONS = ["batch_grad", "sum_grad_squared", "diag_ggn_exact"]


class Program:
    """One loaded program, and its eager twin as the judge."""

    def __init__(self, module):
        self.module = module.double().eval()
        self.program = engine.load(torch.jit.script(self.module))

    def check(self, *inputs, extensions=EXTENSIONS):
        targets = torch.randn(self.module(*inputs).shape, dtype=torch.float64)
        reference = Reference(self.module, inputs, targets, "mse", "mean")
        result = engine.analyze(self.program, inputs, targets, extensions, loss="mse")
        for extension in extensions:
            for parameter, expected in reference.expected(extension).items():
                torch.testing.assert_close(result[extension][parameter], expected, rtol=1e-10, atol=1e-13)
        return result


class SequenceFirst(nn.Module):
    """Rows [T, N] behind a ReLU that may be dead for some of them."""

    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer in (self.l, self.o):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.o(torch.relu(self.l(x.transpose(0, 1)))).sum(0)


@pytest.mark.parametrize("extensions", [["batch_grad"], EXTENSIONS])
def test_dead_rows_do_not_settle_the_order(extensions):
    program = Program(SequenceFirst())
    partly_dead = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)[..., None]
    program.check(partly_dead, extensions=extensions)
    program.check(partly_dead.abs() + 0.5 * torch.rand(2, 2, 1, dtype=torch.float64), extensions=extensions)


class RolledByNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.o(torch.roll(torch.tanh(self.l(x)), int(x[0, 0]), 0))


class PickedByNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.l(x))
        first = int(x[0, 0])
        return self.o(torch.cat([h[first:], h[:first]], 0))


class RoutedByScores(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        scores: list[float] = x[:, 0].tolist()
        order = torch.tensor(scores).argsort()
        return self.o(torch.tanh(self.l(x))[order])


@pytest.mark.parametrize("extensions", [["batch_grad"], EXTENSIONS])
@pytest.mark.parametrize("module", [RolledByNumber, PickedByNumber, RoutedByScores])
def test_numbers_read_from_the_batch_may_route_rows(module, extensions):
    program = Program(module())
    for first in (0.0, 1.0, 2.0, 1.0):
        x = torch.randn(SAMPLES, 3, dtype=torch.float64)
        x[0, 0] = first
        program.check(x, extensions=extensions)


class Neighbours(nn.Module):
    """Rows go where a matrix among the inputs sends them: no operator tells."""

    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, adjacency):
        return self.o(torch.tanh(adjacency @ self.l(x)))


@pytest.mark.parametrize("extensions", [["batch_grad"], EXTENSIONS])
@pytest.mark.parametrize("samples", [4, 70])
def test_a_matrix_of_neighbours_may_route_or_couple_rows(samples, extensions):
    program = Program(Neighbours())
    x, own = torch.randn(samples, 3, dtype=torch.float64), torch.eye(samples, dtype=torch.float64)
    program.check(x, own, extensions=extensions)
    program.check(x, own.roll(1, 0), extensions=extensions)
    with pytest.raises(engine.EngineError, match="coupled"):
        program.check(x, own + 0.01 * own.roll(1, 0), extensions=extensions)


class NeighboursOfSequences(nn.Module):
    """Mixes what a layer without closed form has made."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 2, batch_first=True)

    def forward(self, x, neighbours):
        return neighbours @ self.rnn(x)[0][:, -1]


def test_a_coupling_behind_a_layer_without_closed_form_is_refused_on_later_batches_too():
    program = Program(NeighboursOfSequences())
    x, own = torch.randn(SAMPLES, 4, 3, dtype=torch.float64), torch.eye(SAMPLES, dtype=torch.float64)
    program.check(x, own)
    with pytest.raises(engine.EngineError, match="coupled"):
        program.check(x, own + 0.01 * own.roll(1, 0))


class Gated(nn.Module):
    """Couples samples only where their mean is large."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)
        nn.init.ones_(self.l.weight)

    def forward(self, x):
        h = self.l(x)
        return h + torch.relu(h.mean(0) - 10.0)


@pytest.mark.parametrize("extensions", [["batch_grad"], EXTENSIONS])
def test_a_coupling_that_wakes_up_is_refused(extensions):
    program = Program(Gated())
    x = torch.rand(SAMPLES, 2, dtype=torch.float64)
    program.check(x, extensions=extensions)
    with pytest.raises(engine.EngineError, match="coupled"):
        program.check(x + 100, extensions=extensions)


def test_kept_verdicts_spare_the_second_judgement(monkeypatch):
    program = Program(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    program.check(torch.randn(SAMPLES, 3, dtype=torch.float64))
    monkeypatch.setattr("curvature_engine.methods.judge", lambda *_: pytest.fail("judged again"))
    program.check(torch.randn(SAMPLES, 3, dtype=torch.float64))


def test_a_batch_with_nan_settles_nothing():
    program = Program(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)))
    x = torch.randn(SAMPLES, 3, dtype=torch.float64)
    spoilt = x.clone()
    spoilt[0] = float("nan")
    first = engine.analyze(program.program, spoilt, x[:, :2], ["batch_grad"], loss="mse")
    assert not first.groups["batch_grad"].provenance["0.weight"]["verified"]
    assert program.check(x).groups["batch_grad"].provenance["0.weight"]["verified"]


def test_verdicts_are_bounded_and_the_least_recently_used_goes_first():
    kept = Verdicts(capacity=2)
    for path in ("a", "b", "a", "c"):
        if kept.get(path) is None:
            kept.keep(path, Verdict(()))
    assert len(kept) == 2
    assert kept.get("b") is None
    assert kept.get("a") is not None


def test_a_program_that_sees_many_shapes_stays_small():
    program = Program(nn.Linear(2, 2))
    for samples in range(1, 100):
        x = torch.randn(samples, 2, dtype=torch.float64)
        engine.analyze(program.program, x, x, ["batch_l2"], loss="mse")
    assert len(program.program.verdicts) <= 64


COUPLINGS = {
    "a small share of the mean": lambda h: h + 1e-9 * h.mean(0),
    "the last by the first": lambda h: torch.cat([h[:-1], h[-1:] + 1e-9 * h[:1]]),
    "the first by the last": lambda h: torch.cat([h[:1] + 1e-9 * h[-1:], h[1:]]),
}


class Weak(nn.Module):
    def __init__(self, coupling):
        super().__init__()
        self.l, self.coupling = nn.Linear(3, 2), coupling

    def forward(self, x):
        return self.coupling(self.l(x))


@pytest.mark.parametrize("samples", [2, 5, 70])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_weak_couplings_are_refused(coupling, samples):
    x = torch.randn(samples, 3, dtype=torch.float64)
    traced = torch.jit.trace(Weak(COUPLINGS[coupling]).double().eval(), x, check_trace=False)
    with pytest.raises(engine.EngineError, match="coupled"):
        engine.analyze(traced, x, x[:, :2], ["batch_grad"], loss="mse")


class HalfSequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.l(x.transpose(0, 1))).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_told_apart_in_low_precision(dtype):
    torch.manual_seed(0)
    module, x = HalfSequenceFirst(), torch.randn(SAMPLES, 3, 3)
    targets = torch.randn(SAMPLES, 2)
    expected = Reference(module, (x,), targets, "mse", "sum").batch_grad()["l.weight"]
    script = torch.jit.script(module.to(dtype))
    result = engine.analyze(script, x.to(dtype), targets, ["batch_grad"], loss="mse", reduction="sum")
    actual = result["batch_grad"]["l.weight"]
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()
    coupled = torch.jit.trace(Weak(lambda h: h - h.mean(0)).to(dtype), x[:, 0].to(dtype), check_trace=False)
    with pytest.raises(engine.EngineError, match="coupled"):
        engine.analyze(coupled, x[:, 0].to(dtype), targets, ["batch_grad"], loss="mse")
