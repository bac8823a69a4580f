"""Uses of parameters with their saved inputs arranged: what rules take."""

from dataclasses import dataclass, replace

from torch import Tensor

from curvature_engine.precision import accumulation_dtype
from curvature_engine.probe import Attribution
from curvature_engine.tape import Tap, Use


class Arranged:
    """A tap's saved inputs, arranged sample-major [N, T, …]; made when they are looked at, and again if let go."""

    def __init__(self, tap: Tap, attribution: Attribution) -> None:
        self._tap, self._attribution = tap, attribution
        self._saved: tuple[Tensor, ...] | None = None

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """The inputs, at least in float32 where they are floating-point numbers."""
        if self._saved is None:
            rule = self._tap.rule
            assert rule is not None
            self._saved = tuple(
                self._attribution.arrange(
                    t.to(accumulation_dtype(t.dtype)) if t.is_floating_point() else t, rule.row_axes
                )
                for t in rule.rows(self._tap.saved)
            )
        return self._saved

    def let_go(self) -> None:
        """Hold them no longer."""
        self._saved = None


@dataclass(frozen=True)
class PreparedUse:
    """One use of a parameter, its saved inputs arranged sample-major."""

    tap: Tap
    tap_index: int
    use: Use
    attribution: Attribution
    arranged: Arranged
    chosen: tuple[Tensor, ...] | None = None
    """Saved inputs of some samples, in place of all."""

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """The tap's saved inputs, [N, T, …] each."""
        return self.arranged.saved if self.chosen is None else self.chosen

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
