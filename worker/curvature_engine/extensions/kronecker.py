"""Kronecker factors: KFAC (sampled columns) and KFLR (exact columns), with three ways to treat shared positions.

Per weight a pair B [out, out], A [in, in] with block ≈ B ⊗ A; per bias B alone. With s the back-propagated column
and x the input at each of T positions:

- expand: B = Σ s sᵀ, A = 1/(N·T) Σ x xᵀ (for convolutions KFC, Grosse & Martens 2016);
- reduce: s summed and x averaged over positions, A = 1/N Σ x xᵀ (Eschenhagen et al. 2023);
- backpack: B as in reduce, A = 1/N Σ over all positions (what BackPACK returns; it overestimates convolutions).

Uses of one parameter by several layers of a kind count as further positions. Grouped convolutions have one pair per
group: [groups, out/groups, out/groups] and so on.
"""

import torch
from torch import Tensor

from curvature_engine.contributions import Absent, ClosedForm, Contribution, PreparedUse
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.ggn_diagonal import MC_SAMPLES
from curvature_engine.tape import Use

_APPROXIMATION = {
    "type": "string",
    "enum": ["expand", "reduce", "backpack"],
    "default": "expand",
    "description": "how positions that share a weight are treated",
}


class _Kronecker(Accumulator):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._approximation = str(setting.options["approximation"])
        self._B: dict[str, Tensor] = {}
        self._A: dict[str, Tensor | None] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        if parameter in self.missing:
            return
        if not isinstance(contribution, ClosedForm):
            self.missing[parameter] = (
                "does not reach the outputs"
                if isinstance(contribution, Absent)
                else "no Kronecker form: its individual gradients come from the universal fallback"
            )
            return
        outputs = [p.tap.rule.factor_outputs(p.use.role, g) for p, g in contribution.uses if p.tap.rule is not None]
        reason = self._obstacle(contribution, outputs)
        if reason is not None:
            self.missing[parameter] = reason
            return
        s = torch.cat([o for o in outputs if o is not None], dim=2)  # [groups, N, positions, out]
        B = self._second_moment(s if self._approximation == "expand" else s.sum(2, keepdim=True))
        if parameter in self._B:
            self._B[parameter].add_(B)
        else:
            self._B[parameter] = B
            self._A[parameter] = self._input_factor([p for p, _ in contribution.uses])

    def finish(self, columns: int) -> dict[str, Tensor | KroneckerFactors]:
        return {name: self._pair(B / columns if columns > 1 else B, self._A[name]) for name, B in self._B.items()}

    def _obstacle(self, contribution: ClosedForm, outputs: list[Tensor | None]) -> str | None:
        """Why there is no Kronecker form, or None."""
        uses = [p for p, _ in contribution.uses]
        if any(o is None for o in outputs):
            kinds = sorted({p.tap.name for p, o in zip(uses, outputs, strict=True) if o is None})
            return f"no Kronecker form for {', '.join(kinds)}"
        if any(not _is_whole(p.use) for p in uses):
            return "no Kronecker form: a layer consumes only a part or a rearrangement of it"
        roles = {p.use.role for p in uses}
        if len(roles) > 1 or len({(o.shape[0], o.shape[3]) for o in outputs if o is not None}) > 1:
            return "no Kronecker form: it is tied across layers of different kinds"
        return self._obstacle_in_rows(uses) if roles == {"weight"} else None

    def _obstacle_in_rows(self, uses: list[PreparedUse]) -> str | None:
        """Why the inputs' factor cannot be formed, or None. Rows without gradient count in it, too."""
        averaged = self._approximation == "reduce"
        for attribution in (p.attribution for p in uses):
            if not attribution.determined and (averaged or attribution.index is not None):
                return "no Kronecker form: no gradient reaches some rows of its layer, so their samples are unknown"
            if averaged and not attribution.even:
                return "no Kronecker form by reduce: samples have different numbers of positions"
        return None

    def _input_factor(self, uses: list[PreparedUse]) -> Tensor | None:
        if uses[0].use.role != "weight":
            return None
        inputs, rows = [], 0
        for prepared in uses:
            rule = prepared.tap.rule
            x = None if rule is None else rule.factor_inputs(prepared.saved)
            assert x is not None
            inputs.append(x)
            # Padding rows of zeros (irregular attributions) do not count as positions.
            rows += prepared.attribution.R * (x.shape[2] // prepared.saved[0].shape[1])
        x = torch.cat(inputs, dim=2)
        N = self.setting.N
        if self._approximation == "reduce":
            return self._second_moment(x.sum(2, keepdim=True) * (N / rows)) / N
        return self._second_moment(x) / (rows if self._approximation == "expand" else N)

    @staticmethod
    def _second_moment(rows: Tensor) -> Tensor:
        """Σ over samples and positions of r rᵀ: [groups, n, positions, d] → [groups, d, d]."""
        flat = rows.flatten(1, 2)
        return torch.bmm(flat.transpose(1, 2), flat)

    @staticmethod
    def _pair(B: Tensor, A: Tensor | None) -> KroneckerFactors:
        if B.shape[0] > 1:
            return KroneckerFactors(B, A)
        return KroneckerFactors(B[0], None if A is None else A[0])


def _is_whole(use: Use) -> bool:
    """Whether the consumed tensor is the parameter itself, flattened to two axes, or the transpose of that."""
    index = use.watched.index
    if index is None:
        return True
    expected = torch.arange(index.numel(), device=index.device)
    return bool(torch.equal(index.reshape(-1), expected)) or (
        index.dim() == 2 and bool(torch.equal(index.T.reshape(-1), expected))
    )


KFAC = Extension(
    "kfac",
    "Kronecker factors with sampled columns",
    "factors",
    "B [out, out], A [in, in]",
    "block ≈ B ⊗ A; s with E s sᵀ = H_n, M draws averaged: from targets drawn from the model's likelihood "
    "(cross-entropy, squared error, bce_with_logits), else root(H_n) times normal numbers",
    "Martens & Grosse 2015, eq. 1; Grosse & Martens 2016; Eschenhagen et al. 2023",
    "sampled",
    _Kronecker,
    {"mc_samples": MC_SAMPLES, "approximation": _APPROXIMATION},
)
KFLR = Extension(
    "kflr",
    "Kronecker factors with the exact columns of the loss's Hessian",
    "factors",
    "B [out, out], A [in, in]",
    "block ≈ B ⊗ A; s from all columns of the square root of H_n",
    "Botev, Ritter & Barber 2017; Eschenhagen et al. 2023",
    "exact",
    _Kronecker,
    {"approximation": _APPROXIMATION},
)
