"""Whose memory a result lies in: its own, and nobody else's."""

from itertools import pairwise

import pytest
import torch
from tests.engine.models import CASES, build, targets_for
from torch import nn

import curvature_engine as engine
from curvature_engine.passes import _sum_of

REQUESTS = [
    *("batch_loss", "outputs", "grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance"),
    *("diag_ggn_exact", "batch_diag_ggn_mc", "sqrt_ggn_mc", "saliency"),
    {"name": "batch_grad", "label": "again"},
    {"name": "grad", "label": "grad again"},
]


class Added(nn.Module):
    """What comes back to `a`, `b` and `c` is the cotangent itself, or a view of it."""

    def __init__(self, N):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(size)) for size in ((N, 3), (N * 3,), (3, N)))

    def forward(self, x):
        return x + self.a + self.b.view_as(x) + self.c.t()


class Single(nn.Module):
    """Of one sample, sums over the batch have one term."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.first = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 3)

    def forward(self, x):
        return (self.first(x) + self.a) * self.b


def memories(tensors):
    """(name, first byte, byte after the last) of each that holds any."""
    return [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors if t.nbytes]


def check_disjoint(spans):
    spans = sorted(spans, key=lambda span: span[1])
    shared = [(a[0], b[0]) for a, b in pairwise(spans) if b[1] < a[2]]
    assert not shared, shared


def results_of(analysis):
    for label, group in analysis.groups.items():
        for key, tensor in group.tensors.items():
            yield f"{label} {key}", tensor


def check_owned(module, inputs, targets, requests, **options):
    """Results share no memory, and editing them changes nothing that is computed afterwards."""
    program = engine.load(torch.jit.script(module))
    given = [
        *((f"input {i}", x) for i, x in enumerate(inputs)),
        ("targets", targets),
        *((name, p.tensor.detach()) for name, p in program.parameters.items()),
    ]
    first = engine.analyze(program, inputs, targets, requests, **options)
    check_disjoint(memories([*given, *results_of(first), ("loss", first.loss)]))
    expected = {name: tensor.clone() for name, tensor in results_of(first)}
    for _, tensor in results_of(first):
        tensor.zero_()
    second = engine.analyze(program, inputs, targets, requests, **options)
    check_disjoint(memories([*results_of(first), *results_of(second)]))
    for name, tensor in results_of(second):
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in results_of(first):
        assert not bool(tensor.any()), name


@pytest.mark.parametrize("name", [case.name for case in CASES if "scripted" in case.ways])
def test_results_share_no_memory(name):
    case = next(case for case in CASES if case.name == name)
    module, inputs = build(case)
    loss = case.losses[0]
    check_owned(module, inputs, targets_for(module(*inputs), loss), REQUESTS, loss=loss)


@pytest.mark.parametrize("requests", [["grad"], ["grad", "batch_grad", "batch_l2", "outputs"]])
@pytest.mark.parametrize("N", [1, 2])
def test_a_gradient_that_is_the_cotangent_is_copied(N, requests):
    x, targets = torch.randn(N, 3), torch.randn(N, 3)
    for module in (Added(1), Single()) if N == 1 else (Single(),):
        check_owned(module, (x,), targets, requests, loss="mse", parameters="all")


def test_only_memory_of_nobody_else_becomes_a_gradient():
    like, whole = torch.zeros(3, 2), torch.randn(2, 3)
    place, taken = whole.data_ptr(), set()
    first = _sum_of([whole.view(3, 2)], like, taken)
    assert first.data_ptr() == place
    assert not first._is_view()
    assert torch.equal(first, whole.view(3, 2))
    for gradient, given in [
        (whole.view(3, 2), taken),  # another's already
        (whole.t(), set()),  # in another order
        (torch.randn(4, 2)[:3], set()),  # part of something larger
        (torch.randn(1, 2).expand(3, 2), set()),
        (whole.double().view(3, 2), set()),
    ]:
        found = _sum_of([None, gradient], like, given)
        assert found.untyped_storage().data_ptr() != gradient.untyped_storage().data_ptr()
        assert found.is_contiguous()
        assert found.dtype == like.dtype
        assert torch.equal(found, gradient.float())


def test_a_gradient_can_be_edited_like_any_tensor():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, targets = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    gradients = engine.analyze(torch.jit.script(module), x, targets, ["grad"])["grad"]
    for name, parameter in module.named_parameters():
        assert not gradients[name]._is_view()
        gradients[name].add_(parameter)  # of a view made without grad mode, torch would refuse it
        assert gradients[name].requires_grad


def test_the_check_sees_shared_memory():
    whole = torch.randn(6)
    with pytest.raises(AssertionError):
        check_disjoint(memories([("a", whole[:4]), ("b", whole[3:])]))
    check_disjoint(memories([("a", whole[:3]), ("b", whole[3:])]))
