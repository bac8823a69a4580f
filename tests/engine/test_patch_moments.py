"""Second moments and sums of a convolution's patches, in every form, beside the patches written out."""

from math import prod

import pytest
import torch
from torch import Tensor

from curvature_engine.rules.convolution import DirectConvolutionRule, Geometry, TransposedConvolutionRule
from curvature_engine.rules.gram import Gram, add_gram
from curvature_engine.rules.patch_moments import candidates, choose_form, from_patches, from_shifts

BUDGETS = [1, 10**4, 10**9]

# name: space, kernel, stride, before, after, dilation, groups
GEOMETRIES = {
    "1-D": ((9,), (3,), 1, (1,), (1,), 1, 1),
    "1-D, padded after only": ((7,), (4,), 1, (0,), (3,), 1, 2),
    "2-D": ((6, 7), (3, 3), 1, (0, 0), (0, 0), 1, 1),
    "2-D, same size": ((6, 7), (3, 3), 1, (1, 1), (1, 1), 1, 1),
    "2-D, large kernel": ((6, 6), (5, 5), 1, (2, 2), (2, 2), 1, 1),
    "2-D, uneven sides": ((7, 8), (4, 3), 1, (2, 0), (1, 2), 1, 1),
    "2-D, more padding than kernel": ((3, 4), (2, 3), 1, (3, 3), (2, 3), 1, 2),
    "2-D, a row": ((5, 6), (1, 3), 1, (0, 1), (0, 1), 1, 1),
    "2-D, a column": ((5, 6), (4, 1), 1, (1, 0), (1, 0), 1, 1),
    "2-D, one place": ((5, 6), (1, 1), 1, (0, 0), (0, 0), 1, 1),
    "2-D, kernel as large as the input": ((3, 3), (3, 3), 1, (0, 0), (0, 0), 1, 1),
    "2-D, kernel larger than the input": ((2, 3), (4, 5), 1, (1, 1), (2, 2), 1, 1),
    "2-D, as many positions as places": ((5, 5), (3, 3), 1, (0, 0), (0, 0), 1, 1),
    "2-D, groups": ((6, 5), (3, 3), 1, (1, 1), (1, 1), 1, 2),
    "2-D, depthwise": ((6, 5), (3, 3), 1, (1, 1), (1, 1), 1, 4),
    "2-D, stride": ((7, 9), (3, 3), 2, (1, 0), (0, 1), 1, 1),
    "2-D, stride beyond the kernel": ((7, 9), (2, 2), 3, (0, 0), (0, 0), 1, 2),
    "2-D, dilation": ((7, 9), (3, 2), 1, (2, 1), (1, 0), 2, 1),
    "3-D": ((4, 5, 6), (2, 3, 3), 1, (0, 1, 1), (1, 1, 0), 1, 1),
    "3-D, groups": ((3, 4, 4), (3, 1, 2), 1, (1, 0, 0), (1, 0, 1), 1, 2),
    "3-D, stride": ((4, 5, 6), (2, 2, 2), 2, (0, 1, 0), (0, 1, 0), 1, 1),
}


def build(name: str, samples: int = 3) -> tuple[Tensor, Geometry, tuple[int, ...]]:
    space, kernel, stride, before, after, dilation, groups = GEOMETRIES[name]
    axes = len(space)
    geometry = Geometry((stride,) * axes, before, after, (dilation,) * axes, groups, kernel)
    rows = zip(space, kernel, before, after, strict=True)
    positions = tuple((s + b + a - dilation * (k - 1) - 1) // stride + 1 for s, k, b, a in rows)
    return torch.randn(samples, 4, *space, dtype=torch.float64), geometry, positions


def expected(x: Tensor, geometry: Geometry, positions: tuple[int, ...]) -> Tensor:
    rule = DirectConvolutionRule(geometry, positions)
    patches = rule.factor_inputs((x[:, None],)).flatten(1, 2)
    return patches.mT @ patches


def assert_close(found: Tensor, reference: Tensor) -> None:
    assert found.shape == reference.shape
    assert float((found - reference).abs().max()) <= 1e-12 * float(reference.abs().max())


@pytest.mark.parametrize("budget_bytes", BUDGETS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_form_is_the_product_of_the_patches(name, budget_bytes):
    x, geometry, positions = build(name)
    reference = expected(x, geometry, positions)
    assert_close(from_patches(x, geometry, positions, budget_bytes), reference)
    for shifts in candidates(x, geometry, positions):
        assert_close(from_shifts(x, geometry, shifts, budget_bytes), reference)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_over_positions_are_those_of_the_patches(name):
    x, geometry, positions = build(name, samples=6)
    x = x.view(3, 2, *x.shape[1:])  # two rows a sample
    rule = DirectConvolutionRule(geometry, positions)
    assert rule.input_positions((x,)) == prod(positions)
    assert_close(rule.input_sums((x,), 1), rule.factor_inputs((x,)).sum(2))


def test_stride_one_offers_shifts_of_one_axis_and_of_both():
    assert [s.whole for s in candidates(*build("2-D, same size"))] == [False, True]
    assert [s.whole for s in candidates(*build("3-D"))] == [False]
    for name in ("2-D, stride", "2-D, dilation", "2-D, one place", "2-D, kernel as large as the input"):
        assert candidates(*build(name)) == []


def test_a_large_convolution_costs_little_more_than_the_distinct_shifts():
    x = torch.empty(128, 32, 14, 14)
    geometry = Geometry((1, 1), (2, 2), (2, 2), (1, 1), 1, (5, 5))
    form = choose_form(x, geometry, (14, 14), 2**28)
    assert form.shifts is not None
    assert form.shifts.whole
    assert form.multiply_adds < 128 * 14 * 14 * 32**2 * 25 * 25 / 10


def test_forms_keep_to_the_budget():
    x = torch.empty(128, 32, 14, 14)
    geometry = Geometry((1, 1), (2, 2), (2, 2), (1, 1), 1, (5, 5))
    for budget_bytes in (2**23, 2**25, 2**28):
        assert choose_form(x, geometry, (14, 14), budget_bytes).working_bytes <= budget_bytes


def test_a_moment_has_the_same_bits_again():
    x, geometry, positions = build("2-D, same size")
    rule = DirectConvolutionRule(geometry, positions)
    assert torch.equal(rule.input_moment((x[:, None],), 10**6), rule.input_moment((x[:, None],), 10**6))


@pytest.mark.parametrize("budget_bytes", BUDGETS)
def test_the_transposed_convolution_forms_its_moment_block_by_block(budget_bytes):
    geometry = Geometry((2, 2), (1, 0), (1, 0), (1, 1), 2, (3, 2))
    x = torch.randn(3, 2, 4, 4, 5, dtype=torch.float64)
    rule = TransposedConvolutionRule(geometry, (7, 10), (0, 0))
    patches = rule.factor_inputs((x,))
    rows = patches.flatten(1, 2)
    assert rule.input_positions((x,)) * x.shape[1] == patches.shape[2]
    assert_close(rule.input_moment((x,), budget_bytes), rows.mT @ rows)
    assert_close(rule.input_sums((x,), budget_bytes), patches.sum(2))


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (3, 6), (1, 40)])
def test_moments_of_columns_are_products_of_the_columns(groups, channels):
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), groups, (3, 3))
    rule = DirectConvolutionRule(geometry, (3, 4))
    left, right = (torch.randn(2, 3, channels, 3, 4, dtype=torch.float64) for _ in range(2))
    s, other = (rule.factor_outputs("weight", g).flatten(1, 2) for g in (left, right))
    product = s.mT @ other
    found = rule.output_moment("weight", left, right)
    assert_close(found, product)
    assert_close(rule.output_moment("weight", left, right, found), 2 * product)
    assert_close(rule.output_sums("weight", left), rule.factor_outputs("weight", left).sum(2))


@pytest.mark.parametrize(
    ("groups", "width", "rows"), [(1, 300, 1500), (1, 800, 128), (1, 200, 6), (1, 5, 2000), (2, 9, 7), (1, 4, 0)]
)
def test_half_the_products_make_the_whole_sum(groups, width, rows):
    x = torch.randn(groups, rows, width, dtype=torch.float64)
    total = Gram(groups, width, rows, x)
    for block in x.split(700, 1) if rows else ():
        total.add(block)
    reference = x.mT @ x
    assert_close(total.finish(), reference)
    if rows:
        found = add_gram(x)
        assert_close(found, reference)
        assert_close(add_gram(x, found), 2 * reference)
