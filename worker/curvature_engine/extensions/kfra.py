"""KFRA: Kronecker factors with B from one matrix, averaged over the samples at every operator on the way back.

Where KFAC and KFLR send columns back for every sample, KFRA sends the one matrix B̄ [D, D] (D the elements of one
sample): from Σ_n H_n at the outputs, 1/N Σ_n J_nᵀ B̄ J_n at every operator, under both reductions (Botev, Ritter &
Barber 2017, eq. 21; their 1/N before the loss's Hessian is Z's). At a layer's output, B̄ stands for Σ over columns and
samples of s sᵀ, its blocks B̄_tt′ [out, out] for those of positions t and t′. So the three ways to treat positions that
share a weight are the same sums as for KFAC:

- expand: B = Σ_t B̄_tt, A = 1/(N·T) Σ x xᵀ;
- reduce: B = Σ_tt′ B̄_tt′, A = 1/N Σ x̄ x̄ᵀ with x̄ the mean over positions;
- backpack: B as in reduce, A = 1/N Σ over all positions (BackPACK's KFRA).

Every operator counts as a layer, and elementwise ones whose branches come from one tensor (x σ(x)) as one together:
averaging between two of them gives other numbers than averaging once after both, unless one of them has the same
Jacobian for every sample. With one sample, or without nonlinearities, KFRA is KFLR.
"""

from dataclasses import replace

from curvature_engine.averaged import Averaged
from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Extension, Sketch
from curvature_engine.extensions.kronecker import APPROXIMATION, JOINT_BIAS, STRICT, Kronecker


class _Averaged(Kronecker):
    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        sketch = super().sketch(parameter, contribution)
        if sketch.missing is not None or not isinstance(contribution, ClosedForm):
            return sketch
        matrix = max(g[:1].numel() ** 2 * g.element_size() for _, g in contribution.uses)
        return replace(sketch, intermediate_bytes=max(3 * matrix, sketch.intermediate_bytes or 0))

    def add_averaged(self, parameter: str, contribution: Contribution, averaged: Averaged) -> None:
        if self._takes(parameter, contribution):
            self._current[parameter] = averaged.moment() if self._approximation == "expand" else averaged.summed()


KFRA = Extension(
    "kfra",
    "Kronecker factors of the loss's Hessian averaged over the samples at every operator; for chains of layers",
    "factors",
    "B [out, out], A [in, in]",
    "block ≈ B ⊗ A; B from Σ_n H_n through 1/N Σ_n J_nᵀ B J_n at every operator: with B_tt′ its blocks of a layer's "
    "positions, Σ_t B_tt (expand) or Σ_tt′ B_tt′ (reduce, backpack)",
    "Botev, Ritter & Barber 2017, eq. 21",
    "averaged",
    _Averaged,
    {"approximation": APPROXIMATION, "joint_bias": JOINT_BIAS, "strict": STRICT},
)
