"""Kronecker factors: KFAC (sampled columns, or the gradient) and KFLR (exact ones), shared positions in three ways.

Per weight a pair B [out, out], A [in, in] with block ≈ B ⊗ A; per bias B alone. With s the back-propagated column
and x the input at each of T positions:

- expand: B = Σ s sᵀ, A = 1/(N·T) Σ x xᵀ (for convolutions KFC, Grosse & Martens 2016);
- reduce: s summed and x averaged over positions, A = 1/N Σ x xᵀ (Eschenhagen et al. 2023);
- backpack: B as in reduce, A = 1/N Σ over all positions (what BackPACK returns; it overestimates convolutions).

With `joint_bias` the inputs of a layer with a bias end with a one, and the block is that of [weight, bias].

Uses of one parameter by several layers of a kind count as further positions. Grouped convolutions have one pair per
group: [groups, out/groups, out/groups] and so on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvature_engine.contributions import Absent, ClosedForm, Contribution, PreparedUse
from curvature_engine.errors import EngineError
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.schemas import MC_SAMPLES
from curvature_engine.tape import Use

_APPROXIMATION = {
    "type": "string",
    "enum": ["expand", "reduce", "backpack"],
    "default": "expand",
    "description": "how positions that share a weight are treated",
}
_FISHER = {
    "type": "string",
    "enum": ["mc", "type2", "empirical"],
    "default": "mc",
    "description": 'where s comes from: "mc" targets drawn from the likelihood, "type2" all columns of the square root '
    'of H_n (kflr), "empirical" the gradient at the batch\'s own targets',
}
_JOINT_BIAS = {
    "type": "boolean",
    "default": False,
    "description": "one block for a layer's weight and bias together, under the weight's name",
}
_STRICT = {
    "type": "boolean",
    "default": False,
    "description": "refuse where a parameter has no Kronecker form, instead of leaving it out with the reason",
}


class _Kronecker(Accumulator):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._approximation = str(setting.options["approximation"])
        self._joint = bool(setting.options["joint_bias"])
        self._B: dict[str, Tensor] = {}
        self._A: dict[str, Tensor | None] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        if parameter in self.missing:
            return
        if not isinstance(contribution, ClosedForm):
            absent = isinstance(contribution, Absent)
            fallback = "no Kronecker form: its individual gradients come from the universal fallback"
            self._leave_out(parameter, "does not reach the outputs" if absent else fallback)
            return
        outputs = [p.tap.rule.factor_outputs(p.use.role, g) for p, g in contribution.uses if p.tap.rule is not None]
        reason = self._obstacle(contribution, outputs)
        if reason is not None:
            self._leave_out(parameter, reason)
            return
        s = torch.cat([o for o in outputs if o is not None], dim=2)  # [groups, N, positions, out]
        B = self._second_moment(s if self._approximation == "expand" else s.sum(2, keepdim=True))
        if parameter in self._B:
            self._B[parameter].add_(B)
        else:
            self._B[parameter] = B
            joint = self._joint and self._bias_of(parameter) is not None
            self._A[parameter] = self._input_factor([p for p, _ in contribution.uses], joint)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        if self._joint:
            for weight in list(self._B):
                bias = self._bias_of(weight)
                if bias is not None:
                    self._B.pop(bias, None)
                    self.missing[bias] = f"its block is part of that of {weight}, after the weight's columns"
        # The gradient carries 1/Z, and s only 1/√Z.
        empirical = self.setting.options.get("fisher") == "empirical"
        scale = self.setting.Z if empirical else 1 / self.setting.draws
        return {name: self._pair(B * scale, self._A[name]) for name, B in self._B.items()}

    def _leave_out(self, parameter: str, reason: str) -> None:
        self.missing[parameter] = reason
        if self.setting.options["strict"]:
            raise EngineError(
                "unsupported_model",
                f"strict: {parameter} has no Kronecker factors ({reason})",
                param=parameter,
                remedy="leave strict out to have such parameters listed, or name others in parameters=",
            )

    def _bias_of(self, weight: str) -> str | None:
        """The bias that every layer of this weight adds, and that no other layer adds."""
        uses = self.setting.uses.get(weight, ())
        if any(p.use.role != "weight" for p in uses):
            return None
        added = [[u for u in p.tap.uses if u.role == "bias" and u.watched.index is None] for p in uses]
        names = {biases[0].watched.parameter if len(biases) == 1 else "" for biases in added}
        bias = names.pop() if len(names) == 1 else ""
        taps = sorted(p.tap_index for p in uses)
        return bias if bias and taps == sorted(p.tap_index for p in self.setting.uses.get(bias, ())) else None

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

    def _input_factor(self, uses: list[PreparedUse], joint: bool) -> Tensor | None:
        if uses[0].use.role != "weight":
            return None
        inputs, rows = [], 0
        for prepared in uses:
            rule = prepared.tap.rule
            x = None if rule is None else rule.factor_inputs(prepared.saved)
            assert x is not None
            inputs.append(_with_one(x, prepared) if joint else x)
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


def _with_one(x: Tensor, prepared: PreparedUse) -> Tensor:
    """Inputs [groups, N, positions, in] with what the bias is multiplied by after them; padding rows stay zero."""
    attribution, rule = prepared.attribution, prepared.tap.rule
    assert rule is not None
    ones = attribution.arrange(x.new_full((attribution.R, 1), rule.bias_scale), 1)  # [N, T, 1]
    ones = ones.repeat_interleave(x.shape[2] // ones.shape[1], dim=1)
    return torch.cat([x, ones.expand(x.shape[0], *ones.shape)], dim=3)


def _columns(options: Mapping[str, Any]) -> Mapping[str, Any]:
    columns = {"mc": "sampled", "type2": "exact", "empirical": "gradient"}
    source = {
        "mc": "s from targets drawn from the model's likelihood (M draws, averaged)",
        "type2": "s from all columns of the square root of H_n",
        "empirical": "s the gradient of the sample's loss at its own targets",
    }
    fisher = options["fisher"]
    return {"columns": columns[fisher], "formula": f"block ≈ B ⊗ A; {source[fisher]}"}


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
    {
        "mc_samples": MC_SAMPLES,
        "approximation": _APPROXIMATION,
        "fisher": _FISHER,
        "joint_bias": _JOINT_BIAS,
        "strict": _STRICT,
    },
    _columns,
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
    {"approximation": _APPROXIMATION, "joint_bias": _JOINT_BIAS, "strict": _STRICT},
)
