"""Inner products of the individual gradients."""

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.dot_products import costs, dot_products
from curvature_engine.extensions.base import Extension, Sketch
from curvature_engine.extensions.first_order import PerParameter
from curvature_engine.extensions.schemas import OVER, SCALE, SUBSAMPLING, adapt_to_over


class _BatchDot(PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return dot_products(contribution, self.setting.N, self.setting.budget_bytes)

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        return Sketch(*costs(contribution, self.setting.N), ((self.setting.N, self.setting.N),))


BATCH_DOT = Extension(
    "batch_dot",
    "inner products of the individual gradients",
    "parameters",
    "[N, N]",
    "⟨g_n, g_m⟩",
    "definition; Gram form after Goodfellow 2015",
    "gradient",
    _BatchDot,
    {"over": OVER, "scale": SCALE, "subsampling": SUBSAMPLING},
    adapt_to_over,
)
