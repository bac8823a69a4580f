"""Uses of parameters with their saved inputs arranged: what rules take."""

from dataclasses import dataclass, replace

from torch import Tensor

from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Attribution
from curvature_engine.tape import Tap, Use


@dataclass(frozen=True)
class PreparedUse:
    """One use of a parameter, its saved inputs arranged sample-major: [N, T, …] each."""

    tap: Tap
    tap_index: int
    use: Use
    attribution: Attribution
    saved: tuple[Tensor, ...]

    @property
    def scatters(self) -> bool:
        """Whether a sample's gradient is zero almost everywhere."""
        return self.tap.rule is not None and self.tap.rule.scatters

    def arranged_gradient(self, g: Tensor) -> Tensor:
        """The output's gradient as [N, T, …], at least in float32."""
        rule = self.tap.rule
        assert rule is not None
        g = g.to(accumulation_dtype(g.dtype))
        return self.attribution.arrange(rule.canonical(g), rule.row_axes)

    def arranged_gradients(self, g: Tensor) -> Tensor:
        """Several columns' gradients of the output, [k, *output], as [k·N, T, …]; for samples in row-major order."""
        rule, k = self.tap.rule, len(g)
        assert rule is not None
        g = rule.canonical(g.to(accumulation_dtype(g.dtype)).reshape(k, *self.tap.shapes[0]))
        more = replace(self.attribution, N=k * self.attribution.N, R=k * self.attribution.R)
        return more.arrange(g, 1 + rule.row_axes)


def prepare_use(
    tap: Tap, tap_index: int, use: Use, attribution: Attribution, arranged: dict[int, tuple[Tensor, ...]] | None = None
) -> PreparedUse:
    """Arrange a tap's saved inputs once; every column uses them again, and in `arranged` the tap's other uses."""
    rule = tap.rule
    assert rule is not None
    saved = None if arranged is None else arranged.get(tap_index)
    if saved is None:
        saved = tuple(
            attribution.arrange(t if not t.is_floating_point() else t.to(accumulation_dtype(t.dtype)), rule.row_axes)
            for t in rule.rows(tap.saved)
        )
    if arranged is not None:
        arranged[tap_index] = saved
    return PreparedUse(tap, tap_index, use, attribution, saved)
