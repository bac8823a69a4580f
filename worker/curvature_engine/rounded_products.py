"""Products of float32 matrices whose factors are rounded to bfloat16, where torch has no setting for it (CUDA).

Below autograd every product is one of few operators. Their factors are rounded, products accumulate in float32, and
what is added to them stays as it is. A convolution's result is rounded as well, since cuDNN gives it in its factors'
format. Attention in one fused kernel is not among them and stays in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvature_engine.precision import current

aten = torch.ops.aten
_BF16 = torch.bfloat16


class RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the factors of every product, as long as the analysis in progress multiplies in bfloat16."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, a product with rounded factors."""
        form = _FORMS.get(func) if current() == "bf16" else None
        tensors = [a for a in args if isinstance(a, Tensor)]
        if form is None or not all(t.dtype == torch.float32 for t in tensors):
            return func(*args, **(kwargs or {}))
        return form(func, *args, **(kwargs or {}))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices, or of batches of them."""
    left, right = left.to(_BF16), right.to(_BF16)
    if left.device.type != "cuda":  # products of other devices give their factors' format only
        return left.float() @ right.float()
    product = aten.mm.dtype if left.dim() == 2 else aten.bmm.dtype
    found: Tensor = product(left, right, torch.float32)
    return found


def _plain(func: Any, left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    found = _product(left, right)
    return found if out is None else out.copy_(found)


def _vector(func: Any, left: Tensor, right: Tensor) -> Tensor:
    return _product(left, right[:, None])[:, 0]


def _added(func: Any, total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _sum(total, _product(left, right), beta, alpha)


def _added_in_place(
    func: Any, total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return total.copy_(_sum(total, _product(left, right), beta, alpha))


def _all_added_in_place(
    func: Any, total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return total.copy_(_sum(total, _product(left, right).sum(0), beta, alpha))


def _sum(total: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    # By zero, what was there does not count, whatever it is.
    scaled = product if alpha == 1 else product * alpha
    return scaled if beta == 0 else torch.add(scaled, total, alpha=beta)


def _convolved(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    found: Tensor = func(x.to(_BF16), weight.to(_BF16), None, *rest).float()
    return found if bias is None else found + bias.view(1, -1, *(1,) * (found.dim() - 2))


def _convolved_back(
    func: Any, g: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any
) -> tuple[Tensor | None, ...]:
    *geometry, (for_x, for_weight, for_bias) = rest
    found = func(g.to(_BF16), x.to(_BF16), weight.to(_BF16), None, *geometry, [for_x, for_weight, False])
    bias = g.sum([a for a in range(g.dim()) if a != 1]) if for_bias else None
    return (*(None if t is None else t.float() for t in found[:2]), bias)


_FORMS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _plain,
    aten.mm.out: _plain,
    aten.bmm.default: _plain,
    aten.bmm.out: _plain,
    aten.mv.default: _vector,
    aten.addmm.default: _added,
    aten.baddbmm.default: _added,
    aten.addmm_.default: _added_in_place,
    aten.baddbmm_.default: _added_in_place,
    aten.addbmm_.default: _all_added_in_place,
    aten.convolution.default: _convolved,
    aten.convolution_backward.default: _convolved_back,
}
