"""One parameter's individual gradients for several columns at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.reductions import Outer
from curvature_engine.rules.convolution import ConvolutionRule
from curvature_engine.rules.linear import LinearRule
from curvature_engine.unfolded import Unfolded


@dataclass(frozen=True)
class Stacked:
    """What k columns contribute to a parameter of linear layers or convolutions.

    Attributes:
        uses: each with the gradients of its outputs, column by column, [k·N, T, …].
        unfolded: what rules make of saved inputs.
    """

    uses: Sequence[tuple[PreparedUse, Tensor]]
    like: Tensor
    k: int
    N: int
    budget_bytes: int
    unfolded: Unfolded | None = None

    @classmethod
    def takes(cls, prepared: PreparedUse) -> bool:
        """Whether a use can be one of these: then its gradients of several columns are those of more samples."""
        return isinstance(prepared.tap.rule, LinearRule | ConvolutionRule) and prepared.attribution.order == "major"

    def outer(self) -> Outer | None:
        """The gradients as outer products of `kept` [N, i] and `column` [k·N, j], where they are such."""
        single = self.as_more_samples().single()
        if single is None:
            return None
        prepared, g, rule = single
        return rule.outer(prepared.use.role, prepared.saved, g)

    @property
    def needs_inputs(self) -> bool:
        """Whether gradients are made of the layers' inputs, of which there are no more than N."""
        return any(prepared.use.role != "bias" for prepared, _ in self.uses)

    def as_more_samples(self) -> ClosedForm:
        """The same of k·N samples, for what takes no notice of the layers' inputs, or knows that they are N."""
        return ClosedForm(list(self.uses), self.like, self.k * self.N, self.budget_bytes, block=self.k * self.N)

    def column(self, number: int) -> ClosedForm:
        """What one of the columns contributes."""
        rows = slice(number * self.N, (number + 1) * self.N)
        uses = [(prepared, g[rows]) for prepared, g in self.uses]
        return ClosedForm(uses, self.like, self.N, self.budget_bytes, unfolded=self.unfolded)
