"""Squares of individual gradients summed over columns, from pairs of positions; on CPUs.

Where a sample's gradient under column v is a sum over P positions of products, G_v = Σ_p b_vp a_pᵀ, entry by entry
Σ_v G_v² = Σ_{p ≤ q} w_pq (Σ_v b_vp b_vq)(a_p a_q)ᵀ with w_pp = 1 and w_pq = 2: P (P + 1)/2 products however many
columns there are, and no gradient is ever written. That is less where positions are few and columns many.

Its terms have signs, where squares have none. They come to no more than Σ_n Σ_p a_p² Σ_vp b_vp² (Cauchy and Schwarz):
a result that is small beside this bound has lost digits, and is refused.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.kernels import choice
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.rules import Rule
from curvature_engine.speculation import answer

LEAST_SHARE = 2.0**-7
"""Of the bound: a tensor whose largest entry is smaller would lose more than seven bits of its scale."""
_REDUCED = 16
"""Products that take as long as squaring and adding one number of a gradient."""
_SMALL, _GATHERED = 4, 16
"""Large matrices' products that take as long as one of small ones, and as gathering one number of the outputs' sums."""
_MOST_NUMBERS = 2**22
"""Of one sample's sums over columns."""
_BUFFER_NUMBERS = 2**21
"""Of the inputs' products: what they are multiplied with stays in a CPU's cache beside them."""


def pay(contribution: ClosedForm, columns: int) -> bool:
    """Whether pairs of positions are cheaper than writing and squaring every column's gradients."""
    single = contribution.single()
    if single is None:
        return False
    prepared, g, rule = single
    if g.device.type != "cpu" or choice.is_for_kernels(g):
        return False
    outputs = rule.by_position(prepared.use.role, g[:1])
    if outputs is None:
        return False
    _, P, width = outputs.shape
    if P < 2 or not width:
        return False
    inputs = rule.multiply_adds(prepared.use.role, tuple(s[:1] for s in prepared.saved), g[:1]) // (P * width)
    directly = columns * inputs * (P + _REDUCED)
    by_pairs = _pairs_of(P) * inputs + P * P * (_SMALL * columns + _GATHERED)
    return inputs > 0 and by_pairs < directly and P * P * width <= _MOST_NUMBERS


def multiply_adds(contribution: ClosedForm) -> int:
    """What `PositionPairs` costs for any number of columns, where it pays."""
    prepared, g, rule = _only(contribution)
    outputs = rule.by_position(prepared.use.role, g[:1])
    assert outputs is not None
    P = outputs.shape[1]
    return len(g) * rule.multiply_adds(prepared.use.role, tuple(s[:1] for s in prepared.saved), g[:1]) * (P + 1) // 2


def working_bytes(contribution: ClosedForm) -> int:
    """What `PositionPairs` holds beside the columns: at most, and little more for large ones."""
    prepared, g, rule = _only(contribution)
    role, saved = prepared.use.role, tuple(s[:1] for s in prepared.saved)
    outputs = rule.by_position(role, g[:1])
    assert outputs is not None
    block = min(len(g), max(1, _MOST_NUMBERS // (outputs.shape[1] * outputs.numel())))
    unfolded = block * rule.working_elements(role, saved, g[:1])
    moments = 3 * block * outputs.shape[1] * outputs.numel()
    return (unfolded + moments + _BUFFER_NUMBERS + 2 * math.prod(contribution.shape)) * g.element_size()


class PositionPairs:
    """One parameter's squared gradients under several columns.

    Args:
        columns: the parameter's contributions, of the same samples; `pay` holds for them.
    """

    def __init__(self, columns: Sequence[ClosedForm]) -> None:
        self._prepared, g, self._rule = _only(columns[0])
        self._gradients = [_only(c)[1] for c in columns]
        self.N = len(g)

    def sum_of_squares(self, samples: slice | None = None) -> Tensor | None:
        """Σ over columns and samples of g², [*p]; None where too many digits would be lost."""
        first, stop, _ = (samples or slice(None)).indices(self.N)
        sums: list[Tensor] = []
        bounds: list[Tensor] = []
        while first < stop:
            first += self._add(first, stop, sums, bounds)
        largest, bound = (torch.stack([t.max() for t in found]).max() for found in (sums, bounds))
        # Also false of NaN: gradients that are not finite are squared the direct way.
        if not answer(largest >= LEAST_SHARE * bound):
            return None
        return self._rule.assemble(self._prepared.use.role, [s.clamp_(min=0) for s in sums])

    def _add(self, first: int, stop: int, sums: list[Tensor], bounds: list[Tensor]) -> int:
        """Add some samples' from `first` on to the sums and their bounds, by piece; how many there were."""
        rule, role = self._rule, self._prepared.use.role
        one = rule.by_position(role, self._gradients[0][:1])
        assert one is not None
        P, width = one.shape[1:]
        block = slice(first, min(stop, first + max(1, _MOST_NUMBERS // (P * P * width))))
        saved = tuple(s[block] for s in self._prepared.saved)
        outputs = torch.stack([self._by_position(g[block]) for g in self._gradients], -1)  # [n, P, j, V]
        moments = _moments(outputs.transpose(1, 2))  # [j, n, Q]
        sizes = outputs.square().sum((1, 3))  # [n, j]
        pairs = rule.products(role, saved, self._gradients[0][block], rule.unfold(role, saved))
        assert pairs is not None
        for piece, factors in enumerate(pairs):
            rows = factors[0 if rule.inputs_first else 1]  # [n, P, i]
            bound = _product(sizes.T, rows.square().sum(1), turned=rule.inputs_first)
            total = None if piece == len(sums) else sums[piece]
            found = _add_pairs(moments, rows, total, turned=rule.inputs_first)
            if total is None:
                sums.append(found)
                bounds.append(bound)
            else:
                bounds[piece].add_(bound)
        return block.stop - first

    def _by_position(self, g: Tensor) -> Tensor:
        found = self._rule.by_position(self._prepared.use.role, g)
        assert found is not None
        return found


def _only(contribution: ClosedForm) -> tuple[PreparedUse, Tensor, Rule]:
    single = contribution.single()
    assert single is not None
    return single


def _pairs_of(P: int) -> int:
    return P * (P + 1) // 2


def _moments(outputs: Tensor) -> Tensor:
    """w_pq Σ_v b_vp b_vq of outputs [n, j, P, V], for p ≤ q row by row: [j, n, Q]."""
    n, width, P, V = outputs.shape
    flat = outputs.reshape(n * width, P, V)
    upper = torch.triu_indices(P, P)
    moments = torch.bmm(flat, flat.mT).view(n * width, P * P).index_select(1, upper[0] * P + upper[1])
    weights = torch.full((moments.shape[1],), 2, dtype=moments.dtype).masked_fill_(upper[0] == upper[1], 1)
    return moments.mul_(weights).view(n, width, -1).transpose(0, 1)


def _add_pairs(moments: Tensor, rows: Tensor, total: Tensor | None, *, turned: bool) -> Tensor:
    """Σ_n Σ_pq of moments [j, n, Q] times rows [n, P, i] in pairs: [j, i], or turned [i, j]; added to `total`."""
    for pairs, part in _products_of_pairs(rows):
        left, right = moments[:, :, part].reshape(len(moments), -1), pairs.flatten(0, 1)
        if total is None:
            total = _product(left, right, turned=turned)
        elif turned:
            total.addmm_(right.T, left.T)
        else:
            total.addmm_(left, right)
    assert total is not None
    return total


def _products_of_pairs(rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """a_p a_q of rows [n, P, i] as [n, some, i], and which pairs (p ≤ q, row by row); the next overwrite them."""
    n, P, width = rows.shape
    most = max(P, _BUFFER_NUMBERS // max(1, n * width))
    buffer = rows.new_empty(n * min(most, _pairs_of(P)) * width)
    done = p = 0
    while p < P:
        last, count = p, 0
        while last < P and count + P - last <= most:
            count += P - last
            last += 1
        pairs = buffer[: n * count * width].view(n, count, width)
        place = 0
        for q in range(p, last):
            torch.mul(rows[:, q : q + 1], rows[:, q:], out=pairs[:, place : place + P - q])
            place += P - q
        yield pairs, slice(done, done + count)
        done, p = done + count, last


def _product(left: Tensor, right: Tensor, *, turned: bool) -> Tensor:
    return right.T @ left.T if turned else left @ right
