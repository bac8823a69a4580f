"""Products that threads share by rows."""

import pytest
import torch

from curvature_engine.matrix_products import product_of_columns


@pytest.fixture(params=[1, 2, 3, 6])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize(("a", "b"), [(96, 512), (97, 512), (512, 96), (4, 10), (12, 100_000), (0, 3)])
def test_a_product_of_columns_is_the_sum_of_outer_products(n, a, b):
    torch.manual_seed(0)
    left, right = torch.randn(n, a, dtype=torch.float64), torch.randn(n, b, dtype=torch.float64)
    expected = torch.einsum("na,nb->ab", left, right)
    torch.testing.assert_close(product_of_columns(left, right), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("threads")
def test_factors_and_results_may_be_parts_of_others():
    torch.manual_seed(0)
    left, right = torch.randn(9, 200, dtype=torch.float64), torch.randn(700, 9, dtype=torch.float64)
    whole = torch.full((300, 700), torch.nan, dtype=torch.float64)
    found = product_of_columns(left[::2, 20:116], right.T[::2], whole[100:196])
    assert found.data_ptr() == whole[100:196].data_ptr()
    torch.testing.assert_close(whole[100:196], left[::2, 20:116].T @ right.T[::2], rtol=1e-12, atol=1e-12)
    assert whole.isnan().sum() == 204 * 700
