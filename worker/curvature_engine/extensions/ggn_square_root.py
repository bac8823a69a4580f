"""The square root of the generalized Gauss-Newton matrix: every sample's back-propagated columns, written out."""

from collections.abc import Sequence

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.schemas import MC_SAMPLES, SUBSAMPLING
from curvature_engine.stores import Slab


class _SquareRoot(Accumulator):
    """The columns one after the other, [V, N, *p]."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._columns: dict[str, Slab] = {}
        self._filled: dict[str, int] = {}

    def start(self, rows: Sequence[int]) -> None:
        super().start(rows)
        self._filled.clear()

    def add(self, parameter: str, contribution: Contribution) -> None:
        v = self._filled.get(parameter, 0)
        if parameter not in self._columns:
            self._columns[parameter] = self.setting.slab(parameter, (self.setting.columns, self.setting.N))
        self._filled[parameter] = v + 1
        rows, contribution = (
            [v * self.setting.N + row for row in self.rows],
            contribution.scaled(self.setting.draws**-0.5),
        )
        place = self._columns[parameter].place(rows)
        if place is not None:
            contribution.write_into(place)
            return
        for first, block in contribution.blocks():
            self._columns[parameter].write(rows[first : first + len(block)], block)

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.setting.columns, self.setting.N, *shape)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: columns.result() for name, columns in self._columns.items()}


SQRT_GGN_EXACT = Extension(
    "sqrt_ggn_exact",
    "square root of the generalized Gauss-Newton matrix, column by column",
    "parameters",
    "[V, N, *p]",
    "J_nᵀ s_nv with Σ_v s_nv s_nvᵀ = H_n; V = C·T, column v = c·T + t; Σ over v and n of the squares is diag_ggn_exact",
    "Dangel, Tatzel & Hennig 2022",
    "exact",
    _SquareRoot,
    {"subsampling": SUBSAMPLING},
    merging="append",
    streams=True,
    degree=0.5,
    sample_axis=1,
)
SQRT_GGN_MC = Extension(
    "sqrt_ggn_mc",
    "square root of the generalized Gauss-Newton matrix by sampled columns",
    "parameters",
    "[V, N, *p]",
    "J_nᵀ s_nm/√M, s from targets drawn from the likelihood; V = M; Σ over m and n of the squares is diag_ggn_mc",
    "Dangel, Tatzel & Hennig 2022",
    "sampled",
    _SquareRoot,
    {"mc_samples": MC_SAMPLES, "subsampling": SUBSAMPLING},
    merging="append",
    streams=True,
    degree=0.5,
    sample_axis=1,
)
