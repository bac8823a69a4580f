"""Rules are found once for calls of such shapes: a call that is otherwise must get another."""

import torch
from tests.engine.reference import Reference
from torch import Tensor, nn

import curvature_engine as engine
from curvature_engine.rules import matching

QUANTITIES = ["batch_grad", "batch_l2", "sum_grad_squared", "diag_ggn_exact"]


def check(module: nn.Module, *inputs: Tensor) -> None:
    module = module.double().eval()
    targets = torch.randn(module(*inputs).shape, dtype=torch.float64)
    reference = Reference(module, inputs, targets, "mse", "mean")
    result = engine.analyze(torch.jit.script(module), inputs, targets, QUANTITIES, loss="mse")
    for quantity in QUANTITIES:
        for parameter, expected in reference.expected(quantity).items():
            torch.testing.assert_close(result[quantity][parameter], expected, rtol=1e-10, atol=1e-13)


class Flat(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flatten(1)[:, :3]


CONVOLUTIONS = {
    "as usual": {"padding": 1},
    "dilated": {"padding": 2, "dilation": 2},
    "in groups": {"padding": 1, "groups": 2},
    "by name": {"padding": "same"},
    "by name, dilated": {"padding": "same", "dilation": 2},
    "without bias": {"padding": 1, "bias": False},
}


def test_convolutions_that_differ_in_numbers_alone():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    for options in CONVOLUTIONS.values():
        check(Flat(nn.Conv2d(2, 2, 3, **options)), x)
    check(Flat(nn.ConvTranspose2d(2, 2, 3, padding=1)), x)
    check(Flat(nn.ConvTranspose2d(2, 2, 3, padding=2, dilation=2)), x)


class Product(nn.Module):
    def __init__(self, alpha: float, beta: float):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))
        self.alpha, self.beta = alpha, beta

    def forward(self, x):
        return torch.addmm(self.b, torch.tanh(x), self.W, alpha=self.alpha, beta=self.beta)


class Turned(nn.Module):
    """As `Product`, by the weight's transpose, or with the parameters for what is the batch elsewhere."""

    def __init__(self, only_bias: bool):
        super().__init__()
        self.W, self.b, self.only_bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4)), only_bias

    def forward(self, x):
        if self.only_bias:
            return nn.functional.linear(x, self.W.detach(), self.b)
        return nn.functional.linear(x, self.W, self.b)


def test_products_that_differ_in_numbers_alone():
    torch.manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64)
    for alpha, beta in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (2, 0.5), (-1.0, 1.0)):
        check(Product(alpha, beta), x)
    check(Turned(only_bias=False), x)
    check(Turned(only_bias=True), x)


def test_a_rule_is_found_once(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(matching, "_KNOWN", {})
    program = engine.load(torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))))
    for N in (2, 2, 5):
        engine.analyze(program, torch.randn(N, 4), torch.randint(0, 3, (N,)), ["batch_grad"])
    assert len(matching._KNOWN) == 4  # two layers, two batch sizes
    monkeypatch.setattr(matching, "_MOST_KNOWN", 3)
    engine.analyze(program, torch.randn(4, 4), torch.randint(0, 3, (4,)), ["batch_grad"])
    assert len(matching._KNOWN) == 2
