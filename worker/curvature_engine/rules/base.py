"""What a rule is: the closed form of one kind of parameter consumption.

A rule sees its operator's saved inputs and the gradient of its output, both arranged sample-major: `[n, T, …]`, the T
rows of each of n samples. (Rows are the leading axes along which the operator treats everything alike: tokens of a
linear layer, images of a convolution.) From them it makes the samples' gradients of each parameter it consumed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from curvature_engine.reductions import Moments, Outer
from curvature_engine.rules.gram import add_gram, add_product, gram_multiply_adds


class Rule(ABC):
    """Closed forms of one operator call.

    Attributes:
        row_axes: how many leading axes of `canonical(g)` are rows.
        channel_axis: axis of the arranged g [n, T, …], without n, whose entries belong to separate elements of the
            consumed tensor; None where there is no such axis.
        bias_scale: what the operator multiplies its bias by.
        inputs_first: whether the consumed weight is [in, out, …] in place of [out, in, …].
        scatters: whether a sample's gradient is zero but for the elements that it picked.
        sums: whether the sum of the samples' gradients is cheaper so than by autograd, on CPUs.
        key: all that it follows from, the same for rules that are alike; None where that is not known.
    """

    row_axes: int
    channel_axis: int | None = None
    bias_scale: float = 1
    inputs_first: bool = False
    scatters: bool = False
    sums: bool = False
    key: Hashable | None = None

    @property
    def whole(self) -> bool:
        """Whether `pieces` gives the consumed tensor's gradients in one piece."""
        return type(self).pieces is Rule.pieces

    def canonical(self, g: Tensor) -> Tensor:
        """The output's gradient with the row axes first."""
        return g

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the rule needs of the saved inputs, each with the same row axes as `canonical(g)`."""
        return tuple(saved)

    def magnitude(self, row: Tensor) -> Tensor:
        """What rounding in one of `rows` is measured by: its absolute values, or of what it came from."""
        return row if row.dtype == torch.bool else row.abs()

    @abstractmethod
    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        """Gradients of the consumed tensor: saved and g `[n, T, …]` → `[n, *shape]`."""

    def outer(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Outer | None:
        """The gradients as outer products of one vector of the saved inputs and one of g, where they are such."""
        return None

    def per_sample_into(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> bool:
        """Write `per_sample` into `out` [n, *shape] without a copy between; False where there is no such way."""
        return False

    def into_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        """How many numbers `per_sample_into` holds beside what it writes: from shapes alone."""
        return self.working_elements(role, saved, g)

    def add_per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> None:
        """Add `per_sample` to `out` [n, *shape], which is contiguous."""
        out.add_(self.per_sample(role, saved, g).reshape(out.shape))

    def unfold(self, role: str, saved: Sequence[Tensor]) -> Tensor | None:
        """What `pieces` takes of the saved inputs, the same for every g; None where it takes them as they are."""
        return None

    def unfolded_elements(self, role: str, saved: Sequence[Tensor]) -> int:
        """How many numbers `unfold` gives."""
        return 0

    def pieces(self, role: str, saved: Sequence[Tensor], g: Tensor, unfolded: Tensor | None) -> Iterator[Tensor]:
        """`per_sample` in parts of the consumed tensor, [n, *piece] each, in whatever order is cheapest to make.

        `unfolded` is what `unfold` gives.
        """
        yield self.per_sample(role, saved, g)

    def is_product(self, role: str, g: Tensor) -> bool:
        """Whether `products` gives anything where `unfold` does."""
        return False

    def products(
        self, role: str, saved: Sequence[Tensor], g: Tensor, unfolded: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]] | None:
        """The factors l [n, rows, a], r [n, rows, b] of every piece [n, a, b] = Σ_rows l rᵀ, where pieces are such.

        Of the shapes that `assemble` takes, up to how b is divided into axes; views where they can be.
        """
        return None

    def by_position(self, role: str, g: Tensor) -> Tensor | None:
        """The factor of g in `products`, the same for all pieces, [n, rows, a]; None where there may be none."""
        return None

    def inputs_by_position(self, role: str, saved: Sequence[Tensor]) -> Tensor | None:
        """With `by_position`, the other factor of the gradients in the consumed tensor's own order, [n, rows, b]."""
        return None

    def windows_elements(self, role: str, saved: Sequence[Tensor]) -> int:
        """How many numbers `inputs_by_position` makes."""
        return 0

    def assemble(self, role: str, pieces: list[Tensor]) -> Tensor:
        """Something of every piece, [*piece], as a tensor of the consumed one's shape."""
        (whole,) = pieces
        return whole.contiguous()

    def working_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        """How many numbers `pieces` holds beside the gradients, at most: from shapes alone."""
        return max(g.numel(), *(s.numel() for s in saved)) if saved else g.numel()

    def multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        """How many multiplications and additions `per_sample` takes: from shapes alone."""
        return g.numel()

    def norms_multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        """How many `squared_norms` takes, where it goes without writing gradients out."""
        return g.numel()

    def sum_squared(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        """Σ_n (gradient_n)² without writing the gradients out, where that is possible: `[*shape]`."""
        return None

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        """‖gradient_n‖² without writing the gradients out, where that is cheaper: `[n]`."""
        return None

    def moments(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Moments | None:
        """Mean and centred sum of squares without writing the gradients out, where that is possible: `[*shape]`."""
        return None

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        """Whether `sum_squared` or `squared_norms` has a form for such shapes."""
        reduce = self.sum_squared if reduction == "sum_squared" else self.squared_norms
        return reduce(role, saved, torch.zeros_like(g)) is not None

    def factor_inputs(self, saved: Sequence[Tensor]) -> Tensor | None:
        """Inputs x of the Kronecker factor A: `[groups, n, positions, in]`; None where there is no such form."""
        return None

    def factor_outputs(self, role: str, g: Tensor) -> Tensor | None:
        """Back-propagated columns s of the Kronecker factor B: `[groups, n, positions, out]`, or None."""
        return None

    def input_positions(self, saved: Sequence[Tensor]) -> int:
        """How many of `factor_inputs`' positions one row has."""
        x = self.factor_inputs([s[:1] for s in saved])
        return 0 if x is None else x.shape[2] // max(1, saved[0].shape[1])

    def input_moment(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        """Σ x xᵀ of `factor_inputs` over samples and positions, `[groups, in, in]`: a tensor of its own."""
        total: Tensor | None = None
        for x in self._input_blocks(saved, budget_bytes):
            rows = x.flatten(1, 2)
            total = add_product(rows, rows, total)
        return total

    def scaled_input_moment(self, saved: Sequence[Tensor], budget_bytes: int, factor: float) -> Tensor | None:
        """`input_moment` times a factor."""
        found = self.input_moment(saved, budget_bytes)
        return found if found is None or factor == 1 else found.mul_(factor)

    def input_moment_cost(self, saved: Sequence[Tensor], budget_bytes: int) -> tuple[int, int]:
        """What `input_moment` takes, from shapes alone: multiplications and additions, and bytes beside the result."""
        x = self.factor_inputs([s[:1] for s in saved])
        if x is None:
            return 0, 0
        n = len(saved[0])
        held = max(x.nbytes, min(budget_bytes, n * x.nbytes)) + x.shape[0] * x.shape[3] ** 2 * x.element_size()
        return gram_multiply_adds(x.shape[0], x.shape[3], n * x.shape[2], x.device), held

    def input_sums(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        """Σ x of `factor_inputs` over each sample's positions, `[groups, n, in]`."""
        blocks = [x.sum(2) for x in self._input_blocks(saved, budget_bytes)]
        return torch.cat(blocks, 1) if blocks else None

    def output_sums(self, role: str, g: Tensor) -> Tensor | None:
        """Σ s of `factor_outputs` over each sample's positions, `[groups, n, out]`."""
        s = self.factor_outputs(role, g)
        return None if s is None else s.sum(2)

    def output_moment(self, role: str, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor | None:
        """Σ l rᵀ of `factor_outputs` over samples and positions, `[groups, out, out]`; added to `total` if there is."""
        s = self.factor_outputs(role, left)
        if right is left:
            return None if s is None else add_gram(s.flatten(1, 2), total)
        other = self.factor_outputs(role, right)
        return None if s is None or other is None else add_product(s.flatten(1, 2), other.flatten(1, 2), total)

    def _input_blocks(self, saved: Sequence[Tensor], budget_bytes: int) -> Iterator[Tensor]:
        """`factor_inputs` of as many samples at a time as fit the budget."""
        one = self.factor_inputs([s[:1] for s in saved])
        if one is None:
            return
        size = max(1, budget_bytes // max(1, one.nbytes))
        for first in range(0, len(saved[0]), size):
            x = self.factor_inputs([s[first : first + size] for s in saved])
            assert x is not None
            yield x

    @classmethod
    def offers_factors(cls, operator: str) -> bool:
        """Whether some call of an operator may have a Kronecker form: asked before any run."""
        return cls.factor_outputs is not Rule.factor_outputs


Through = Literal["first row", "reciprocal"]


class Match(NamedTuple):
    """A rule that applies.

    Attributes:
        roles: of each watched argument position.
        saved: the tensors to keep.
        through: positions where not the argument itself enters: the "first row" of one whose rows are all alike (what
            is expanded over the batch), or its "reciprocal".
    """

    rule: Rule
    roles: Mapping[int, str]
    saved: tuple[Tensor, ...]
    through: Mapping[int, Through] = MappingProxyType({})


class Matcher(Protocol):
    """Finds the rule of an operator call, or None where no closed form applies."""

    def __call__(self, name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
        """Match a call of aten operator `name` whose argument positions `watched` hold parameters."""
        ...


M = TypeVar("M", bound=Matcher)


def gives(rule: type[Rule]) -> Callable[[M], M]:
    """Say which rule a matcher gives, for those who ask before any run."""

    def note(matcher: M) -> M:
        matcher.rule = rule  # type: ignore[attr-defined]
        return matcher

    return note
