"""Squares of many columns' gradients, from pairs of the few positions that these are summed over."""

import warnings

import pytest
import torch
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import position_pairs
from curvature_engine.extensions import squared_columns
from curvature_engine.position_pairs import PositionPairs

EXTENSIONS = ["diag_ggn_exact", "batch_diag_ggn_exact", "diag_hessian", "batch_diag_hessian"]


class Tokens(nn.Module):
    """Products with weights stored either way, on five rows a sample."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return (torch.tanh(self.first(x)) @ self.second).sum(1)


def _net(layer, space):
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).double()
    net(torch.zeros(1, layer.in_channels, *space, dtype=torch.float64))
    return net


NETS = {
    "two axes": (lambda: _net(nn.Conv2d(2, 5, 3, padding=1), (2, 3)), (2, 2, 3)),
    "strided and dilated": (lambda: _net(nn.Conv2d(2, 3, 2, stride=2, dilation=2), (5, 6)), (2, 5, 6)),
    "many channels": (lambda: _net(nn.Conv2d(20, 3, 3, padding=1), (2, 2)), (20, 2, 2)),
    "one axis": (lambda: _net(nn.Conv1d(3, 4, 3), (7,)), (3, 7)),
    "three axes": (lambda: _net(nn.Conv3d(2, 3, 2), (2, 3, 3)), (2, 2, 3, 3)),
    "groups, which are squared directly": (lambda: _net(nn.Conv2d(4, 4, 3, groups=2, padding=1), (2, 2)), (4, 2, 2)),
    "tokens": (lambda: Tokens().double(), (5, 4)),
}


@pytest.fixture(autouse=True)
def of_small_layers(monkeypatch):
    """What the outputs' sums cost decides for layers as small as these: have it cost nothing."""
    monkeypatch.setattr(position_pairs, "_SMALL", 0)
    monkeypatch.setattr(position_pairs, "_GATHERED", 0)


@pytest.fixture
def used(monkeypatch):
    """Shapes of what was made of pairs."""
    found, sums = [], PositionPairs.sum_of_squares

    def noting(self, samples=None):
        result = sums(self, samples)
        found.append(None if result is None else tuple(result.shape))
        return result

    monkeypatch.setattr(PositionPairs, "sum_of_squares", noting)
    return found


def _batch(shape, N=6):
    torch.manual_seed(1)
    return torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3


@pytest.mark.parametrize("numbers", [(2**22, 2**21), (100, 40)], ids=["at once", "few samples and pairs at a time"])
@pytest.mark.parametrize("name", NETS)
def test_equals_brute_force(name, numbers, used, monkeypatch):
    monkeypatch.setattr(position_pairs, "_MOST_NUMBERS", max(numbers[0], 36 * 7))
    monkeypatch.setattr(position_pairs, "_BUFFER_NUMBERS", numbers[1])
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make()
    inputs, targets = _batch(shape)
    analysis = engine.analyze(torch.jit.script(net), inputs, targets, EXTENSIONS, verify=True)
    reference = Reference(net, (inputs,), targets, "cross_entropy", "mean")
    hessian = reference.batch_diag_hessian()
    wanted = {name: reference.expected(name) for name in EXTENSIONS[:2]}
    wanted |= {"diag_hessian": {n: b.sum(0) for n, b in hessian.items()}, "batch_diag_hessian": hessian}
    for extension, tensors in wanted.items():
        for parameter, expected in tensors.items():
            error = (analysis[extension][parameter] - expected).abs().max() / expected.abs().max()
            assert error < 1e-10, (extension, parameter)
    assert ("groups" in name) == (not used)
    assert None not in used


@pytest.mark.parametrize("held", [2**25, 2 * 6 * 5 * 6 * 8], ids=["all columns", "two at a time"])
def test_sampled_columns_and_samples_of_a_request(held, used, monkeypatch):
    monkeypatch.setattr(squared_columns, "_HELD_BYTES", held)
    torch.manual_seed(0)
    net = NETS["two axes"][0]()
    inputs, targets = _batch((2, 2, 3))
    request = [
        {"name": "diag_ggn_mc", "options": {"mc_samples": 7}},
        {"name": "batch_diag_ggn_mc", "options": {"mc_samples": 7}},
        {"name": "diag_ggn_exact", "options": {"subsampling": [4, 1]}},
        {"name": "batch_diag_ggn_exact", "options": {"subsampling": [4, 1]}},
    ]
    program = engine.load(torch.jit.script(net))
    found = engine.analyze(program, inputs, targets, request, seed=3)
    assert used
    made = len(used)
    monkeypatch.setattr(position_pairs, "pay", lambda *_: False)
    expected = engine.analyze(program, inputs, targets, request, seed=3)
    assert len(used) == made
    for each in request:
        for parameter, tensor in expected[each["name"]].items():
            torch.testing.assert_close(found[each["name"]][parameter], tensor, rtol=1e-10, atol=1e-14)


def test_what_would_lose_its_digits_is_squared_directly(used):
    """Inputs that hardly differ by position, and outputs of which only differences count."""

    class Differences(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 4)

        def forward(self, x):
            y = self.layer(x)
            return self.head((y - y.mean(1, keepdim=True)).square().sum(1) * 1e4)

    torch.manual_seed(0)
    net = Differences()
    inputs, targets = 1 + 1e-3 * torch.randn(6, 8, 4), torch.arange(6) % 3
    found = engine.analyze(torch.jit.script(net), inputs, targets, EXTENSIONS[:2])
    exact = engine.analyze(torch.jit.script(net.double()), inputs.double(), targets, EXTENSIONS[:2])
    assert None in used
    for extension in EXTENSIONS[:2]:
        expected = exact[extension]["layer.weight"]
        # As a difference of float32 numbers near 1, its own gradients are exact to about 1e-4.
        assert (found[extension]["layer.weight"] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_gradients_that_are_not_finite_show(used):
    net = NETS["two axes"][0]()
    inputs, targets = _batch((2, 2, 3))
    inputs[2] = float("nan")
    found = engine.analyze(torch.jit.script(net), inputs, targets, EXTENSIONS[:2])
    assert None in used
    assert found["diag_ggn_exact"]["0.weight"].isnan().all()
    by_sample = found["batch_diag_ggn_exact"]["0.weight"].flatten(1)
    assert by_sample.isnan().all(1).tolist() == [n == 2 for n in range(6)]


def test_lacking_memory_takes_columns_one_by_one(monkeypatch):
    net = NETS["two axes"][0]()
    inputs, targets = _batch((2, 2, 3))
    program = engine.load(torch.jit.script(net))
    expected = engine.analyze(program, inputs, targets, EXTENSIONS[:2])

    def lacking(*_):
        raise MemoryError("not enough memory")

    monkeypatch.setattr(PositionPairs, "sum_of_squares", lacking)
    found = engine.analyze(program, inputs, targets, EXTENSIONS[:2])
    for extension in EXTENSIONS[:2]:
        for parameter, tensor in expected[extension].items():
            torch.testing.assert_close(found[extension][parameter], tensor, rtol=1e-10, atol=1e-14)


def test_a_weight_that_some_columns_reach_otherwise():
    """The first output sees the shared weight through one layer, the others through both."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            once = torch.tanh(x @ self.weight).sum(1)
            twice = torch.tanh(torch.tanh(x @ self.weight) @ self.weight).sum(1)
            return torch.cat([once[:, :1], twice], 1)

    torch.manual_seed(0)
    net = Shared().double()
    inputs, targets = _batch((5, 3))
    for loss, reduction in (("cross_entropy", "mean"), ("mse", "sum")):
        wanted = targets if loss == "cross_entropy" else torch.randn(6, 4, dtype=torch.float64)
        found = engine.analyze(torch.jit.script(net), inputs, wanted, EXTENSIONS[:2], loss=loss, reduction=reduction)
        reference = Reference(net, (inputs,), wanted, loss, reduction)
        for extension in EXTENSIONS[:2]:
            torch.testing.assert_close(
                found[extension]["weight"], reference.expected(extension)["weight"], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize(
    ("inputs", "outputs", "positions"), [(4, 0, 5), (0, 3, 5), (4, 3, 0)], ids=["outputs", "inputs", "positions"]
)
def test_layers_without(inputs, outputs, positions, used):
    """Nothing comes out of the layer, goes into it, or is seen by it."""

    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs, self.positions = inputs, positions
            self.empty, self.head = nn.Linear(inputs, outputs), nn.Linear(4 + outputs, 3)

        def forward(self, x):
            return self.head(torch.cat([x[:, 0], self.empty(x[:, : self.positions, : self.inputs]).sum(1)], 1))

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch initializes no elements
        net = Nothing().double()
    x, targets = _batch((5, 4))
    found = engine.analyze(torch.jit.script(net), x, targets, EXTENSIONS[:2], seed=0)
    reference = Reference(net, (x,), targets, "cross_entropy", "mean")
    for extension in EXTENSIONS[:2]:
        expected = reference.expected(extension)
        for parameter, tensor in found[extension].items():
            assert tensor.shape == expected[parameter].shape
            torch.testing.assert_close(tensor, expected[parameter], rtol=1e-10, atol=1e-14)
    assert not used


def test_the_plan_says_so():
    net = NETS["two axes"][0]()
    inputs, targets = _batch((2, 2, 3))
    plan = engine.analyze(torch.jit.script(net), inputs, targets, EXTENSIONS[:2]).plan
    for request in plan.requests:
        forms = {p.parameter: p.form for p in request.parameters}
        assert forms["0.weight"] == "gram", request.label
    # 6 samples, 21 pairs of positions, 18 × 5 entries.
    (weight,) = (p for p in plan.requests[0].parameters if p.parameter == "0.weight")
    assert weight.multiply_adds == pytest.approx(6 * 21 * 90, rel=0.1)


@pytest.mark.parametrize(
    ("channels", "side", "columns", "pays"),
    [
        (512, 4, 9, True),  # a deep layer, ten classes
        (256, 8, 9, False),  # 2,080 pairs
        (96, 6, 99, True),
        (96, 12, 99, False),  # sums of 144² products over the columns
        (512, 4, 3, False),
    ],
)
def test_when_it_pays(channels, side, columns, pays, monkeypatch):
    monkeypatch.undo()
    taken = []
    pay = position_pairs.pay

    def noting(contribution, _):
        taken.append(pay(contribution, columns))
        return False

    monkeypatch.setattr(position_pairs, "pay", noting)
    net = nn.Sequential(nn.Conv2d(channels, 96, 3, padding=1), nn.AvgPool2d(side), nn.Flatten(), nn.Linear(96, 3))
    engine.analyze(
        torch.jit.script(net), torch.randn(2, channels, side, side), torch.tensor([0, 1]), ["diag_ggn_exact"]
    )
    assert set(taken[:1]) == {pays}
