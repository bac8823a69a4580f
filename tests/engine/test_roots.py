"""Square roots of the loss's Hessian with as few columns as its rank, against those of the convention."""

import pytest
import torch
from tests.engine.losses import LOSS_CASES
from torch import Tensor, nn

import curvature_engine as engine
from curvature_engine.losses import LossSpec


def bound(outputs, targets, reduction="mean", **options):
    loss = {"name": "cross_entropy", **options}
    return LossSpec.parse(loss, reduction).bind(outputs, targets)


def hessians(columns, count):
    """Σ_v s sᵀ, [N, D, D]."""
    S = torch.stack([columns(v).reshape(len(columns(v)), -1) for v in range(count)], 2)
    return S @ S.transpose(1, 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", [c for c in LOSS_CASES if c.second_order], ids=lambda case: case.id)
def test_every_loss_has_one_root_as_good_as_the_other(case, reduction):
    module, inputs, targets = case.build()
    loss = LossSpec.parse(case.request, reduction).bind(module(*inputs), targets)
    found, expected = hessians(loss.root_column, loss.rank), hessians(loss.exact_column, loss.columns)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    if loss.name == "cross_entropy":
        assert loss.rank == loss.columns * 2 // 3  # three classes


@pytest.mark.parametrize("case", [c for c in LOSS_CASES if c.second_order], ids=lambda case: case.id)
def test_the_sum_over_samples_at_once(case):
    module, inputs, targets = case.build()
    loss = LossSpec.parse(case.request, "mean").bind(module(*inputs), targets)
    expected = hessians(loss.exact_column, loss.columns).sum(0)
    torch.testing.assert_close(loss.summed_hessian(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("classes", "rank"), [(1, 1), (2, 1), (17, 16)])
def test_any_number_of_classes(classes, rank):
    outputs = 3.0 * torch.randn(5, classes, dtype=torch.float64)
    loss = bound(outputs, torch.randint(0, classes, (5,)))
    p = outputs.softmax(1)
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 5
    assert loss.rank == rank
    torch.testing.assert_close(hessians(loss.root_column, rank), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": [1.0, 0.5, 2.0, 0.0, 3.0]}])
@pytest.mark.parametrize(("shape", "axis"), [((4, 5), None), ((4, 5, 1), None), ((4, 1, 5), "last"), ((4, 5, 2), None)])
def test_several_columns_at_once_are_those_one_by_one(shape, axis, options):
    torch.manual_seed(0)
    outputs = 3.0 * torch.randn(shape, dtype=torch.float64)
    positions = torch.tensor([1, 4, -100, 0])
    targets = positions.view(4, *[1] * (len(shape) - 2)).expand([n for n in shape if n != 5])
    loss = bound(outputs, targets, options={**options, "class_axis": axis})
    one, several = (loss.root_column, loss.root_columns), (loss.exact_column, loss.exact_columns)
    for (make, make_several), count in zip((one, several), (loss.rank, loss.columns), strict=True):
        columns = torch.stack([make(v) for v in range(count)])
        for first, stop in ((0, count), (1, 3), (count - 1, count)):
            torch.testing.assert_close(make_several(first, stop), columns[first:stop], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("peak", [0, 3, 6])
@pytest.mark.parametrize("height", [0.0, 10.0, 30.0, 90.0, 200.0])
def test_nothing_cancels_under_a_peaked_softmax(peak, height):
    """In float32, p (1 − p) of the likeliest class is lost in rounding by the convention's columns."""
    outputs = torch.randn(4, 7, dtype=torch.float64)
    outputs[:, peak] += height
    rounded = outputs.float()
    p = rounded.double().softmax(1)
    expected = -p[:, :, None] * p[:, None, :]
    rest = torch.stack([p[:, [i for i in range(7) if i != k]].sum(1) for k in range(7)], 1)  # 1 − p
    expected.diagonal(dim1=1, dim2=2).copy_(p * rest)
    loss = bound(rounded, torch.zeros(4, dtype=torch.long), "sum")
    columns = loss.root_columns(0, loss.rank).double()
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    # What float32 has no normal numbers for is as good as zero.
    allowed = 2e-6 * scale[:, :, None] * scale[:, None, :] + 1e-36
    for make in (lambda v: loss.root_column(v).double(), lambda v: columns[v]):
        assert bool(((hessians(make, loss.rank) - expected).abs() <= allowed).all())
    summed = loss.summed_hessian().double()
    assert bool(((summed - expected.sum(0)).abs() <= allowed.sum(0)).all())


def test_a_probability_of_zero_makes_no_undefined_number():
    outputs = torch.tensor([[0.0, 0.0, -1e4, -1e4], [-1e4, -1e4, 0.0, 0.0], [0.0, -1e4, -1e4, -1e4]])
    loss = bound(outputs, torch.zeros(3, dtype=torch.long), "sum")
    found = hessians(loss.root_column, loss.rank)
    torch.testing.assert_close(hessians(lambda v: loss.root_columns(v, v + 1)[0], loss.rank), found)
    expected = torch.zeros(3, 4, 4)
    block = torch.tensor([[0.25, -0.25], [-0.25, 0.25]])
    expected[0, :2, :2], expected[1, 2:, 2:] = block, block
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_an_undefined_output_stays_undefined():
    outputs = torch.randn(3, 4)
    outputs[1, 2] = float("nan")
    loss = bound(outputs, torch.zeros(3, dtype=torch.long))
    columns = torch.stack([loss.root_column(v) for v in range(loss.rank)])
    assert columns[:, 1].isnan().any(0)[1:].all()
    assert columns[:, [0, 2]].isfinite().all()
    assert torch.equal(loss.root_columns(0, loss.rank).isnan().any(2), columns.isnan().any(2))


DIAGONALS = ["diag_ggn_exact", "batch_diag_ggn_exact", "diag_hessian", "batch_diag_hessian", "saliency"]
FACTORS = ["kflr", {"name": "kfac", "options": {"fisher": "type2"}}]


def job(asked, classes=5, progress=None):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    inputs, targets = torch.randn(4, 6, dtype=torch.float64), torch.randint(0, classes, (4,))
    program = engine.load(torch.jit.script(module))
    return engine.plan(program, inputs, targets, asked), engine.analyze(
        program, inputs, targets, asked, progress=progress
    )


@pytest.mark.parametrize("asked", [*DIAGONALS, *FACTORS])
def test_what_is_the_same_for_every_root_takes_the_shortest_and_only_alone(asked):
    steps = []
    plan, alone = job([asked], progress=lambda *at: steps.append(at))
    assert plan.columns["exact"] == 4
    assert plan.requests[0].column_count == 4
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    together, beside = job([asked, "sqrt_ggn_exact"])
    assert together.columns["exact"] == 5
    label = plan.requests[0].label
    for parameter, value in alone[label].items():
        parts, others = (v if isinstance(v, tuple) else (v,) for v in (value, beside[label][parameter]))
        for part, other in zip(parts, others, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-11, atol=1e-15)


def test_the_square_root_itself_keeps_its_columns():
    plan, result = job(["sqrt_ggn_exact"])
    assert plan.columns["exact"] == 5
    assert all(v.shape[0] == 5 for v in result["sqrt_ggn_exact"].values())


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sum(1) - targets[:, 0]).square()


def zero_for_some(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of rank 2 for the second and third sample, 1 for the others."""
    return (outputs[:, 0] - outputs[:, 1]).square() + (targets[:, 0] > 0).to(outputs) * outputs[:, 2].exp()


@pytest.mark.parametrize(("function", "rank"), [(summed, 1), (zero_for_some, 2)])
def test_a_loss_of_the_users_own_has_as_many_columns_as_its_rank(function, rank):
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    inputs, targets = torch.randn(4, 6, dtype=torch.float64), torch.tensor([[-1.0], [1.0], [1.0], [-1.0]])
    program = engine.load(torch.jit.script(module))
    asked = ["diag_ggn_exact", "kflr"]
    loss = torch.jit.script(function)
    assert engine.plan(program, inputs, targets, asked, loss=loss).columns["exact"] == rank
    alone = engine.analyze(program, inputs, targets, asked, loss=loss)
    beside = engine.analyze(program, inputs, targets, [*asked, "sqrt_ggn_exact"], loss=loss)
    for parameter, columns in beside["sqrt_ggn_exact"].items():
        assert columns.shape[0] == 4
        found = alone["diag_ggn_exact"][parameter]
        torch.testing.assert_close(found, columns.square().sum((0, 1)), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(alone["kflr"][parameter].B, beside["kflr"][parameter].B, rtol=1e-11, atol=1e-15)
