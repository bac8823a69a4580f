"""Inner products of the individual gradients, with one another or with another batch's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.cross_products import cross_costs, cross_products
from curvature_engine.dot_products import costs, dot_products
from curvature_engine.extensions.base import Extension, Setting, Sketch
from curvature_engine.extensions.first_order import PerParameter
from curvature_engine.extensions.schemas import AGAINST, OVER, SCALE, SUBSAMPLING, adapt_to_over


class _BatchDot(PerParameter):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.against is not None and setting.options["scale"] == "sample":
            self._factor = setting.Z * setting.against.Z

    def add(self, parameter: str, contribution: Contribution) -> None:
        against, N = self.setting.against, self.setting.N
        if against is None:
            super().add(parameter, contribution)
            return
        other = against.gradients(parameter)
        products = cross_products(contribution, N, other, against.N, self.setting.budget_bytes)
        self._put(parameter, self._scaled(products))

    def reduce(self, contribution: Contribution) -> Tensor:
        return dot_products(contribution, self.setting.N, self.setting.budget_bytes)

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        N, against = self.setting.N, self.setting.against
        if against is None:
            return Sketch(*costs(contribution, N), ((N, N),))
        other = against.work.contribution(parameter)
        return Sketch(*cross_costs(contribution, N, other, against.N), ((N, against.N),))


def _adapt(options: Mapping[str, Any]) -> Mapping[str, Any]:
    changed = dict(adapt_to_over(options))
    if options["against"] is not None:
        changed |= {"shape": "[N, N′]", "formula": "⟨g_n, g′_m⟩, g′ the gradients of the other batch, with its own Z"}
    return changed


BATCH_DOT = Extension(
    "batch_dot",
    "inner products of the individual gradients",
    "parameters",
    "[N, N]",
    "⟨g_n, g_m⟩",
    "definition; Gram form after Goodfellow 2015",
    "gradient",
    _BatchDot,
    {"over": OVER, "scale": SCALE, "subsampling": SUBSAMPLING, "against": AGAINST},
    _adapt,
)
