"""Columns sent together through a program's last layers: the same numbers as one by one."""

from dataclasses import replace

import pytest
import torch
from tests.engine.checking import build, check
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import curvature_engine as engine
from curvature_engine import column_squares, columns, stretch_steps, stretches
from curvature_engine.passes import BackwardPasses

REQUESTS = [
    "diag_ggn_exact",
    "batch_diag_ggn_exact",
    "sqrt_ggn_exact",
    "diag_hessian",
    "batch_diag_hessian",
    *({"name": "kflr", "label": a, "options": {"approximation": a}} for a in ("expand", "reduce", "backpack")),
    {"name": "diag_ggn_exact", "label": "some", "options": {"subsampling": [3, 1]}},
]


class Scaled(nn.Module):
    """`addmm` with factors of its own."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.addmm(self.b, x, self.w, beta=0.5, alpha=1.5)


class Twice(nn.Module):
    """One layer before and in the head, and one bias added to two of them."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.tanh(self.layer(x))
        return self.last(torch.relu(self.layer(x * x)))


class Around(nn.Module):
    """Something passes the last layer by."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        return self.last(x) + x


class Hypernetwork(nn.Module):
    """A last product with a weight that the batch makes."""

    def __init__(self):
        super().__init__()
        self.inner, self.maker = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.mm(self.inner(x), self.maker.weight @ self.inner.weight)


class Positions(nn.Module):
    """Linear layers on several rows of each sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(10, 4)

    def forward(self, x):
        return self.last(torch.relu(self.b(torch.tanh(self.a(x.view(-1, 2, 3))))).flatten(1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(torch.relu_(self.a(x)))


def mlp(activation):
    return lambda: nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 5, bias=False), activation, nn.Linear(5, 4))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)
    )


class Mean(nn.Module):
    """Over an image's positions, named from the end, or with the axes kept."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).flatten(1) if self.keep else x.mean((-1, -2))


class Residual(nn.Module):
    """Something passes a convolution by."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return torch.relu(self.last(x + self.b(x))).mean((2, 3))


class Recurring(nn.Module):
    """One convolution, twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 4, 6)

    def forward(self, x):
        return self.last(torch.relu(self.layer(torch.tanh(self.layer(x))))).flatten(1)


class Made(nn.Module):
    """A convolution with a weight that the batch makes, behind one without."""

    def __init__(self):
        super().__init__()
        self.first, self.maker, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 4)

    def forward(self, x):
        weight = self.maker.weight * self.first.weight.sum()
        return self.last(torch.relu(torch.conv2d(self.first(x), weight))).flatten(1)


def images(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers], nn.Flatten(), nn.LazyLinear(4))


CONVOLUTIONS = {
    "padded": images(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), nn.ReLU, lambda: nn.Conv2d(3, 4, 3, bias=False)),
    "same": images(lambda: nn.Conv2d(2, 3, 3, padding="same"), nn.ReLU, lambda: nn.Conv2d(3, 4, 5, padding="same")),
    "strided": images(
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Sigmoid, lambda: nn.Conv2d(3, 4, 2, stride=1)
    ),
    "dilated": images(lambda: nn.Conv2d(2, 3, 2, dilation=2), nn.ReLU, lambda: nn.Conv2d(3, 4, 2, dilation=(1, 2))),
    "grouped": images(lambda: nn.Conv2d(2, 4, 3, groups=2), nn.ReLU, lambda: nn.Conv2d(4, 4, 3, groups=4)),
    "transposed": images(lambda: nn.ConvTranspose2d(2, 3, 2), nn.ReLU, lambda: nn.ConvTranspose2d(3, 2, 2, stride=2)),
    "max-pooled": images(lambda: nn.Conv2d(2, 3, 3), lambda: nn.MaxPool2d(3, 1, padding=1), lambda: nn.Conv2d(3, 2, 2)),
    "max-pooled, padded": images(
        lambda: nn.Conv2d(2, 3, 3), nn.ReLU, lambda: nn.ZeroPad2d((0, 1, 2, 0)), lambda: nn.MaxPool2d(3, 2)
    ),
    "max-pooled, rectified": images(
        lambda: nn.Conv2d(2, 3, 3), lambda: nn.MaxPool2d(2, ceil_mode=True), nn.ReLU, lambda: nn.Conv2d(3, 2, 2)
    ),
    "mean-pooled": images(lambda: nn.Conv2d(2, 3, 3), nn.ReLU, lambda: nn.AvgPool2d(2, 1), lambda: nn.Conv2d(3, 2, 2)),
    "mean-pooled, padded": images(lambda: nn.Conv2d(2, 3, 3), lambda: nn.AvgPool2d(3, 2, padding=1)),
    "mean-pooled by 3": images(
        lambda: nn.Conv2d(2, 3, 3), lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False, divisor_override=3)
    ),
    "averaged": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), Mean(False)),
    "averaged, kept": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), Mean(True)),
    "first of one": images(lambda: nn.Conv2d(2, 3, 1), nn.Tanh, lambda: nn.Conv2d(3, 4, 1, stride=2)),
}
VECTORS, IMAGES = (5, 6), (5, 2, 6, 6)
MODELS = {
    "relu": (mlp(nn.ReLU()), VECTORS, 3),
    "tanh": (mlp(nn.Tanh()), VECTORS, 3),
    "sigmoid": (mlp(nn.Sigmoid()), VECTORS, 3),
    "gelu": (mlp(nn.GELU()), VECTORS, 1),
    "gelu-tanh": (mlp(nn.GELU(approximate="tanh")), VECTORS, 1),
    "silu": (mlp(nn.SiLU()), VECTORS, 3),
    "elu": (mlp(nn.ELU()), VECTORS, 1),
    "convolutional": (convolutional, IMAGES, 3),
    "addmm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Scaled()), VECTORS, 2),
    "twice": (Twice, VECTORS, 2),
    "around": (Around, VECTORS, 0),
    "hypernetwork": (Hypernetwork, VECTORS, 0),
    "positions": (Positions, VECTORS, 3),
    "in-place": (InPlace, VECTORS, 2),
    "weight-norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), weight_norm(nn.Linear(5, 4))), VECTORS, 0),
    "residual": (Residual, IMAGES, 1),
    "recurring": (Recurring, IMAGES, 3),
    "made": (Made, IMAGES, 1),
    "cropped": (images(lambda: nn.Conv2d(2, 3, 3), lambda: nn.ZeroPad2d((1, -1, 0, 0))), IMAGES, 1),
    "signal": (images(lambda: nn.Conv1d(2, 3, 3), nn.ReLU, lambda: nn.Conv1d(3, 4, 2)), (5, 2, 7), 3),
    "volume": (images(lambda: nn.Conv3d(2, 3, 2), nn.ReLU, lambda: nn.Conv3d(3, 4, 2)), (5, 2, 3, 4, 3), 3),
    **{name: (make, IMAGES, None) for name, make in CONVOLUTIONS.items()},
}


@pytest.fixture(params=[1, 3, 100])
def together(request, monkeypatch):
    """How many columns go together at most; and the stretches that were found."""
    found = []

    def find(*arguments):
        found.append([replace(each, together=request.param) for each in stretches.find_stretches(*arguments)])
        return found[-1]

    monkeypatch.setattr(columns, "find_stretches", find)
    return found


def initialised(make, shape):
    """As `make`, with the shapes of lazy layers found."""

    def made():
        module = make()
        module(torch.zeros(shape))
        return module

    return made


@pytest.mark.parametrize("name", MODELS)
def test_numbers_equal_brute_force_and_one_by_one(together, monkeypatch, name):
    make, shape, taps = MODELS[name]
    module, inputs = build(initialised(make, shape), shape)
    model = torch.jit.trace(module, inputs, check_trace=False)
    check(module, inputs, model, hessian=True)
    layers = sum(isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) for m in module.modules())
    assert [sum(len(each.taps) for each in found) for found in together] == [layers if taps is None else taps]
    targets = torch.arange(5) % module(*inputs).shape[1]
    several = engine.analyze(model, inputs, targets, REQUESTS)
    monkeypatch.setattr(columns, "find_stretches", lambda *_: [])
    single = engine.analyze(model, inputs, targets, REQUESTS)
    assert several.groups.keys() == single.groups.keys()
    for label, group in single.groups.items():
        assert group.tensors.keys() == several.groups[label].tensors.keys()
        assert group.missing == several.groups[label].missing
        for key, expected in group.tensors.items():
            actual = several.groups[label].tensors[key]
            scale = float(expected.abs().max())
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13 * scale, msg=f"{label} {key}")


def test_relu_passes_what_autograd_passes_where_gradients_are_infinite():
    x = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    output = torch.relu(x)
    column = torch.tensor([[float("inf"), float("nan"), float("inf")]])
    (expected,) = torch.autograd.grad(output, [x], column, retain_graph=True)
    actual = stretch_steps.VECTORS["ReluBackward0"](output.grad_fn, column[None])
    torch.testing.assert_close(actual[0], expected, equal_nan=True)


def test_more_columns_go_together_the_smaller_they_are():
    module, _ = build(convolutional, IMAGES)
    found = []
    for n in (8, 80_000):
        x = torch.randn(n, 2, 6, 6)
        output = module.float()(x)
        tape = engine.tape.Tape()
        tape.taps.append(_tap(output))
        found.append(stretches.find_stretches(output, tape, [0])[0].together)
    assert found[0] > 100 * found[1]
    assert found[1] >= 1


def _tap(output):
    edge = torch.autograd.graph.get_gradient_edge(output)
    return engine.tape.Tap("linear", None, (), (edge,), (tuple(output.shape),), (), (), False)


LAYOUTS = {
    "max-pooled, padded": CONVOLUTIONS["max-pooled, padded"],
    "max-pooled, rectified": CONVOLUTIONS["max-pooled, rectified"],
    "mean-pooled": CONVOLUTIONS["mean-pooled"],
    "averaged": CONVOLUTIONS["averaged"],
    "large": images(lambda: nn.Conv2d(2, 400, 5, padding=2), nn.ReLU, lambda: nn.Conv2d(400, 40, 5)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers_are_those_of_autograd_where_images_lie_channels_last(monkeypatch, name):
    """Which only those in float32 do."""
    torch.manual_seed(0)
    net = initialised(LAYOUTS[name], IMAGES)()
    inputs, targets = torch.randn(IMAGES), torch.arange(5) % 4
    program = engine.load(torch.jit.script(net))
    several = engine.analyze(program, inputs, targets, REQUESTS)
    monkeypatch.setattr(columns, "find_stretches", lambda *_: [])
    single = engine.analyze(program, inputs, targets, REQUESTS)
    for label, group in single.groups.items():
        for key, expected in group.tensors.items():
            error = (several.groups[label].tensors[key] - expected).abs().max()
            assert error <= 2e-6 * expected.abs().max(), (label, key)


def test_only_what_is_asked_for_is_on_the_way():
    torch.manual_seed(0)
    net = initialised(CONVOLUTIONS["strided"], IMAGES)()
    tape = engine.tape.Tape()
    first = net[0](torch.randn(IMAGES))
    second = net[2](torch.sigmoid(first))
    outputs = net[4](second.flatten(1))
    tape.taps += [_tap(first), _tap(second), _tap(outputs)]
    ends = {tuple(needed): stretches.find_stretches(outputs, tape, needed) for needed in ([0, 1, 2], [1], [2])}
    assert [len(found) for found in ends.values()] == [3, 2, 1]
    assert all(found[-1].end is None for found in ends.values())
    names = [node.name() for node, _ in ends[(1,)][-1].steps]
    assert names == ["ConvolutionBackward0"], "nothing of the layer before"


def test_images_too_large_for_a_cache_are_left_to_autograd():
    net = initialised(CONVOLUTIONS["max-pooled, padded"], IMAGES)()
    found = []
    for n in (8, 80_000):
        tape = engine.tape.Tape()
        image = net[0](torch.randn(n, 2, 6, 6))
        outputs = net[5](net[3](net[2](net[1](image))).flatten(1))
        tape.taps += [_tap(image), _tap(outputs)]
        found.append([len(each.taps) for each in stretches.find_stretches(outputs, tape, [0, 1])])
    assert found == [[1, 1], [1]]


class Rows(nn.Module):
    """A product with a weight, [in, out] or the other way about, on several rows of each sample."""

    def __init__(self, turned):
        super().__init__()
        self.w, self.last = nn.Parameter(torch.randn(3, 4) if turned else torch.randn(4, 3)), nn.Linear(48, 4)
        self.turned = turned

    def forward(self, x):
        rows = x.view(-1, 3)
        rows = torch.mm(rows, self.w) if self.turned else nn.functional.linear(rows, self.w)
        return self.last(torch.tanh(rows).view(-1, 48))


@pytest.mark.parametrize("kept", [0, 2**30], ids=["nothing kept", "all kept"])
@pytest.mark.parametrize("name", ["rows", "turned", "padded", "strided"])
def test_what_columns_share_is_kept_within_its_limit(monkeypatch, name, kept):
    linear = name in ("rows", "turned")  # whose inputs are there anyway
    make, shape = (lambda: Rows(name == "turned"), (5, 36)) if linear else (CONVOLUTIONS[name], IMAGES)
    made = []

    def counted(original):
        def call(contribution, **limit):
            made.append(original(contribution, **limit))
            return made[-1]

        return call

    monkeypatch.setattr(column_squares.ColumnSquares, "of", counted(column_squares.ColumnSquares.of))
    monkeypatch.setattr(column_squares.SampleSquares, "of", counted(column_squares.SampleSquares.of))
    monkeypatch.setattr(BackwardPasses, "kept_bytes", property(lambda self: kept))
    module, inputs = build(initialised(make, shape), shape)
    check(module, inputs, torch.jit.trace(module, inputs, check_trace=False), hessian=True)
    assert made
    assert all(found is not None for found in made) == (linear or kept > 0)
