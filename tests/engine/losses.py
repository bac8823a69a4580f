"""One table of losses: the engine's name and options beside torch's own function, on outputs of many shapes."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tests.engine.models import N
from torch import nn

C, T = 3, 2


class Positions(nn.Module):
    """Outputs [N, C, T], or [N, T, C]: classes second or last."""

    def __init__(self, last=False):
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, C)
        self.last = last

    def forward(self, x):
        y = self.out(torch.tanh(self.a(x)))
        return y if self.last else y.transpose(1, 2)


class Image(nn.Module):
    """Outputs [N, C, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Conv2d(2, 3, 2), nn.Conv2d(3, C, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.a(x)))


class Scalar(nn.Module):
    """Outputs [N]."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.a(x))).squeeze(1)


def flat(*last):
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C), *last)


def vectors():
    return (torch.randn(N, 5),)


def sequences():
    return (torch.randn(N, T, 4),)


def images():
    return (torch.randn(N, 2, 4, 4),)


SHAPES = {
    "[N]": (Scalar, vectors),
    "[N,C]": (flat, vectors),
    "[N,C,T]": (Positions, sequences),
    "[N,T,C]": (lambda: Positions(last=True), sequences),
    "[N,C,h,w]": (Image, images),
    "log-probabilities [N,C]": (lambda: flat(nn.LogSoftmax(1)), vectors),
    "positive [N,C]": (lambda: flat(nn.Softplus()), vectors),
}


def indices(f, ignored=None, axis=1):
    labels = torch.randint(0, f.shape[axis], [n for a, n in enumerate(f.shape) if a != axis])
    if ignored is not None:
        labels.view(-1)[::3] = ignored
    return labels


def real(f):
    return torch.randn(f.shape)


def unit(f):
    return torch.rand(f.shape)


def binary(f):
    return torch.randint(0, 2, f.shape).to(f.dtype)


def counts(f):
    return torch.randint(0, 5, f.shape).to(f.dtype)


def probabilities(f, axis=1):
    return torch.rand(f.shape).softmax(axis)


@dataclass(frozen=True)
class LossCase:
    name: str
    shape: str
    peer: Callable
    """Torch's function of (outputs, targets, reduction)."""
    targets: Callable
    options: dict
    second_order: bool = True

    @property
    def id(self):
        return f"{self.name}-{self.shape}-{self.options}"

    @property
    def request(self):
        return {"name": self.name, "options": self.options}

    def build(self, seed=0):
        """The eager module in float64, its inputs, and targets."""
        torch.manual_seed(seed)
        make, inputs = SHAPES[self.shape]
        with float64_by_default():
            module, inputs = make().double().eval(), inputs()
            with torch.no_grad():
                outputs = module(*inputs)
            return module, inputs, self.targets(outputs)


@contextmanager
def float64_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def cross_entropy(f, t, reduction, weight=None, axis=1, **options):
    weight = None if weight is None else double(weight)
    f = f.movedim(axis, 1)
    t = t.movedim(axis, 1) if t.is_floating_point() else t
    return F.cross_entropy(f, t, weight, reduction=reduction, **options)


def nll(f, t, reduction, weight=None, **options):
    return F.nll_loss(f, t, None if weight is None else double(weight), reduction=reduction, **options)


def bce(f, t, reduction, weight=None, pos_weight=None):
    weight = None if weight is None else double(weight)
    pos_weight = None if pos_weight is None else double(pos_weight)
    return F.binary_cross_entropy_with_logits(f, t, weight, pos_weight=pos_weight, reduction=reduction)


def gaussian(f, t, reduction, var=1.0, **options):
    return F.gaussian_nll_loss(f, t, double(var).expand_as(f), reduction=reduction, **options)


def elementwise(function):
    return lambda f, t, reduction, **options: function(f, t, reduction=reduction, **options)


W = [0.3, 1.7, 0.5]


def _cross_entropy_cases():
    settings = [
        {},
        {"weight": W},
        {"label_smoothing": 0.2},
        {"weight": W, "label_smoothing": 0.3, "ignore_index": 1},
        {"weight": [0.0, 2.0, 1.0], "label_smoothing": 1.0},
    ]
    for shape in ("[N,C]", "[N,C,T]", "[N,C,h,w]"):
        for options in settings:
            ignored = options.get("ignore_index", -100 if shape != "[N,C]" else None)
            peer = partial(cross_entropy, **options)
            yield LossCase("cross_entropy", shape, peer, partial(indices, ignored=ignored), options)
        for options in ({}, {"weight": W, "label_smoothing": 0.3}):
            asked = options if shape == "[N,C]" else {**options, "class_axis": "second"}
            yield LossCase("cross_entropy", shape, partial(cross_entropy, **options), probabilities, asked)
    for options in settings:
        peer, last = partial(cross_entropy, axis=-1, **options), {**options, "class_axis": "last"}
        ignored = options.get("ignore_index", -100)
        yield LossCase("cross_entropy", "[N,T,C]", peer, partial(indices, ignored=ignored, axis=2), last)
    yield LossCase(
        "cross_entropy",
        "[N,T,C]",
        partial(cross_entropy, axis=-1, label_smoothing=0.1),
        partial(probabilities, axis=2),
        {"label_smoothing": 0.1, "class_axis": "last"},
    )


def _elementwise_cases():
    for shape in ("[N]", "[N,C]", "[N,C,h,w]"):
        yield LossCase("mse", shape, elementwise(F.mse_loss), real, {})
        yield LossCase("bce_with_logits", shape, bce, unit, {})
        yield LossCase("gaussian_nll", shape, gaussian, real, {})
        yield LossCase("poisson_nll", shape, elementwise(F.poisson_nll_loss), counts, {})
        yield LossCase("huber", shape, elementwise(F.huber_loss), real, {})
        yield LossCase("smooth_l1", shape, elementwise(F.smooth_l1_loss), real, {})
        yield LossCase("l1", shape, elementwise(F.l1_loss), real, {}, second_order=False)
    for name, function, targets, shape, options in [
        ("bce_with_logits", bce, binary, "[N,C]", {"pos_weight": [0.5, 3.0, 2.0]}),
        ("bce_with_logits", bce, unit, "[N,C]", {"pos_weight": [0.5, 3.0, 0.0], "weight": [1.0, 0.2, 3.0]}),
        ("bce_with_logits", bce, unit, "[N,C,h,w]", {"pos_weight": [[[0.5]], [[2.0]], [[3.0]]], "weight": 0.5}),
        ("gaussian_nll", gaussian, real, "[N,C]", {"var": [0.5, 2.0, 0.01], "eps": 0.1, "full": True}),
        ("poisson_nll", elementwise(F.poisson_nll_loss), counts, "[N,C]", {"full": True}),
        ("poisson_nll", elementwise(F.poisson_nll_loss), counts, "positive [N,C]", {"log_input": False, "eps": 1e-3}),
        ("huber", elementwise(F.huber_loss), real, "[N,C]", {"delta": 0.4}),
        ("smooth_l1", elementwise(F.smooth_l1_loss), real, "[N,C]", {"beta": 0.6}),
    ]:
        yield LossCase(name, shape, partial(function, **options), targets, options)


def _nll_cases():
    for shape in ("log-probabilities [N,C]", "[N,C,T]"):
        for options in ({}, {"weight": W}, {"weight": W, "ignore_index": 1}):
            targets = partial(indices, ignored=options.get("ignore_index"))
            yield LossCase("nll", shape, partial(nll, **options), targets, options, second_order=False)


LOSS_CASES = [*_cross_entropy_cases(), *_elementwise_cases(), *_nll_cases()]
