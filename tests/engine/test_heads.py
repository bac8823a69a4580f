"""Columns sent together through a program's last layers: the same numbers as one by one."""

import pytest
import torch
from tests.engine.checking import build, check
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import curvature_engine as engine
from curvature_engine import columns, heads

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


VECTORS, IMAGES = (5, 6), (5, 2, 6, 6)
MODELS = {
    "relu": (mlp(nn.ReLU()), VECTORS, 3),
    "tanh": (mlp(nn.Tanh()), VECTORS, 3),
    "sigmoid": (mlp(nn.Sigmoid()), VECTORS, 3),
    "gelu": (mlp(nn.GELU()), VECTORS, 1),
    "gelu-tanh": (mlp(nn.GELU(approximate="tanh")), VECTORS, 1),
    "silu": (mlp(nn.SiLU()), VECTORS, 3),
    "elu": (mlp(nn.ELU()), VECTORS, 1),
    "convolutional": (convolutional, IMAGES, 2),
    "addmm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Scaled()), VECTORS, 2),
    "twice": (Twice, VECTORS, 2),
    "around": (Around, VECTORS, 0),
    "hypernetwork": (Hypernetwork, VECTORS, 0),
    "positions": (Positions, VECTORS, 3),
    "in-place": (InPlace, VECTORS, 2),
    "weight-norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), weight_norm(nn.Linear(5, 4))), VECTORS, 0),
}


@pytest.fixture(params=[1, 3, 100])
def together(request, monkeypatch):
    """How many columns go together at most; and the heads that were found."""
    found = []

    def find(*arguments):
        head = heads.find_head(*arguments)
        found.append(head)
        return head

    monkeypatch.setattr(columns, "find_head", find)
    monkeypatch.setattr(heads.Head, "together", lambda self, device: request.param)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_numbers_equal_brute_force_and_one_by_one(together, monkeypatch, name):
    make, shape, taps = MODELS[name]
    module, inputs = build(make, shape)
    model = torch.jit.trace(module, inputs, check_trace=False)
    check(module, inputs, model, hessian=True)
    assert [0 if head is None else len(head.taps) for head in together] == [taps]
    targets = torch.arange(5) % module(*inputs).shape[1]
    several = engine.analyze(model, inputs, targets, REQUESTS)
    monkeypatch.setattr(columns, "find_head", lambda *_: None)
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
    actual = heads._OTHERS["ReluBackward0"](output.grad_fn, column[None])
    torch.testing.assert_close(actual[0], expected, equal_nan=True)


def test_more_columns_go_together_the_smaller_they_are():
    module, _ = build(convolutional, IMAGES)
    found = []
    for n in (8, 80_000):
        x = torch.randn(n, 2, 6, 6)
        output = module.float()(x)
        tape = engine.tape.Tape()
        tape.taps.append(_tap(output))
        found.append(heads.find_head(output, tape, [0]).together(torch.device("cpu")))
    assert found[0] > 100 * found[1]
    assert found[1] >= 1


def _tap(output):
    edge = torch.autograd.graph.get_gradient_edge(output)
    return engine.tape.Tap("linear", None, (), (edge,), (tuple(output.shape),), (), (), False)
