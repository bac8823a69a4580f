"""The sum of squared individual gradients by a fused kernel, where one serves: no gradient is written."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from curvature_engine.kernels import choice
from curvature_engine.prepared_uses import PreparedUse

Unfold = Callable[[PreparedUse, int], Tensor | None]


def fused_squares(prepared: PreparedUse, g: Tensor, block: int, unfold: Unfold) -> list[Tensor] | None:
    """Σ_n g_n² in the rule's pieces, from `block` samples at a time; None where the plain form is to be taken.

    Args:
        prepared: the one use of the parameter.
        block: samples.
        g: the output's gradient, arranged [N, T, …].
        unfold: what the rule makes of the inputs of a block of samples, by the first one's number.
    """
    rule, role, numbers = prepared.tap.rule, prepared.use.role, prepared.use.watched.tensor.numel()
    if rule is None or not choice.is_for_kernels(g):
        return None
    sums: list[Tensor] = []
    for first in range(0, len(g), block):
        part = slice(first, first + block)
        pairs = rule.products(role, tuple(s[part] for s in prepared.saved), g[part], unfold(prepared, first))
        if pairs is None:
            return None
        for piece, (left, right) in enumerate(pairs):
            if first == 0 and not choice.pays_for_squares(left, right, numbers):
                return None
            found = choice.guarded(partial(_sum_of_squares, left, right))
            if found is None:
                return None
            if piece == len(sums):
                sums.append(found)
            else:
                sums[piece].add_(found)
    return sums


def _sum_of_squares(left: Tensor, right: Tensor) -> Tensor:
    from curvature_engine.kernels.squares import sum_of_squares  # Triton is imported when it is first wanted

    return sum_of_squares(left, right)
