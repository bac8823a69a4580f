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

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Absent, Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions.base import Accumulator, Extension, ForeseenUse, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.factor_sums import (
    averaged_moment,
    columns_of_one_sample,
    cost_of_inputs,
    positions,
    summed_columns,
    summed_moment,
)
from curvature_engine.extensions.mergers import OWN, Merger, State, companion
from curvature_engine.extensions.schemas import MC_SAMPLES
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.rules.gram import add_gram, gram_multiply_adds
from curvature_engine.stacked import Stacked
from curvature_engine.tape import Use
from curvature_engine.watched import Derivation

APPROXIMATION = {
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
JOINT_BIAS = {
    "type": "boolean",
    "default": False,
    "description": "one block for a layer's weight and bias together, under the weight's name",
}
STRICT = {
    "type": "boolean",
    "default": False,
    "description": "refuse where a parameter has no Kronecker form, instead of leaving it out with the reason",
}

_COUNT = "count"
_FALLBACK = "no Kronecker form: its individual gradients come from the universal fallback"
_UNREACHED = "does not reach the outputs"


class Kronecker(Accumulator):
    """Sums B over columns, and A once."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._approximation = str(setting.options["approximation"])
        self._joint = bool(setting.options["joint_bias"])
        self._B: dict[str, Tensor] = {}
        self._A: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}
        self._divided: set[str] = set()
        """Parameters whose A was divided by its count as it was made: in one part, which knows its count."""
        self._met: set[str] = set()
        # Of the current part: B, biases with the B of a weight, and why there is no form (None: there is).
        self._current: dict[str, Tensor] = {}
        self._twins: dict[str, tuple[str, float]] = {}
        self._reasons: dict[str, str | None] = {}
        self._weights: dict[str, str] | None = None

    @classmethod
    def foresee(cls, uses: Sequence[ForeseenUse]) -> str | None:
        if not uses or not all(use.closed for use in uses):
            return _FALLBACK if uses else _UNREACHED
        kinds = sorted({use.operator for use in uses if not use.factors})
        return _no_form(kinds) if kinds else None

    def start(self, rows: Sequence[int]) -> None:
        super().start(rows)
        self._close_part()
        self._weights = None

    def add(self, parameter: str, contribution: Contribution) -> None:
        if self._takes(parameter, contribution):
            assert isinstance(contribution, ClosedForm)
            self._add_outputs(parameter, contribution)

    def add_stacked(self, parameter: str, stacked: Stacked) -> bool:
        # B is a sum over columns as over samples, and A takes the inputs, which are the same.
        self.add(parameter, stacked.as_more_samples())
        return True

    def note_missing(self, parameter: str, contribution: Contribution) -> None:
        reason = self._reasons[parameter] = self._reason(contribution)
        if reason is not None:
            self._leave_out(parameter, reason)

    def _takes(self, parameter: str, contribution: Contribution) -> bool:
        """Whether something is to be added to a B of the parameter's own; at a part's first column A is added to."""
        if parameter in self.missing:
            return False
        if parameter not in self._reasons or not isinstance(contribution, ClosedForm):
            self._reasons[parameter] = self._reason(contribution)
        reason = self._reasons[parameter]
        if reason is not None:
            self._leave_out(parameter, reason)
            return False
        assert isinstance(contribution, ClosedForm)
        if parameter not in self._met:  # the inputs are the same for every column
            self._met.add(parameter)
            self._add_inputs(parameter, [p for p, _ in contribution.uses])
            if (twin := self._twin_of(parameter)) is not None:
                self._twins[parameter] = twin
        return parameter not in self._twins

    def _twin_of(self, bias: str) -> tuple[str, float] | None:
        """A weight with the same columns, whose B the bias has, too, and the factor that the bias is multiplied by."""
        uses = self.setting.uses.get(bias, ())
        scales = {p.tap.rule.bias_scale for p in uses if p.tap.rule is not None}
        if len(scales) != 1 or any(p.use.role != "bias" for p in uses):
            return None
        weight = self._weight_of(bias)
        return (weight, scales.pop()) if weight is not None and weight in self._current else None

    def _add_outputs(self, parameter: str, contribution: ClosedForm) -> None:
        """Add a column's Σ s sᵀ, s summed over positions first except under "expand"."""
        if self._approximation != "expand":
            self._current[parameter] = add_gram(summed_columns(contribution), self._current.get(parameter))
            return
        for prepared, g in contribution.uses:
            assert prepared.tap.rule is not None
            B = prepared.tap.rule.output_moment(prepared.use.role, g, g, self._current.get(parameter))
            assert B is not None
            self._current[parameter] = B

    def _close_part(self) -> None:
        """Add the current part's B to that of the parts before."""
        for bias, (weight, scale) in self._twins.items():
            B = self._current[weight]
            self._current[bias] = pages.copied(B) if scale == 1 else B * scale**2
        for name, B in self._current.items():
            self._B[name] = self._B[name].add_(B) if name in self._B else B
        self._current, self._twins, self._reasons = {}, {}, {}
        self._met.clear()

    def obstacle(self, parameter: str, contribution: Contribution) -> str | None:
        reason = self._reason(contribution)
        if reason is not None or not self._joint:
            return reason
        assert isinstance(contribution, ClosedForm)
        is_bias = contribution.uses[0][0].use.role != "weight"
        weight = self._weight_of(parameter) if is_bias else None
        return None if weight is None else _in_block_of(weight)

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        reason = self.obstacle(parameter, contribution)
        if reason is not None:
            return Sketch("factors", 0, (), reason)
        assert isinstance(contribution, ClosedForm)
        n = len(self.rows)
        found = columns_of_one_sample(contribution)
        groups, out = found[0].shape[0], found[0].shape[3]
        places = sum(o.shape[2] for o in found) if self._approximation == "expand" else 1
        shapes = [(groups, out, out) if groups > 1 else (out, out)]
        cost = gram_multiply_adds(groups, out, n * places, found[0].device)
        held = n * sum(o.nbytes for o in found)
        if contribution.uses[0][0].use.role == "weight":
            width = prod(contribution.shape) // max(1, groups * out)
            width += self._joint and self._bias_of(parameter) is not None
            shapes.append((groups, width, width) if groups > 1 else (width, width))
            averaged = self._approximation == "reduce"
            uses = [p for p, _ in contribution.uses]
            products, working = cost_of_inputs(uses, self.setting.budget_bytes, averaged=averaged)
            cost += products // max(1, self.setting.columns)
            held = max(held, working)
        return Sketch("factors", cost, tuple(shapes), intermediate_bytes=held)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        blocks = self._blocks()
        inputs, self._A = self._A, {}
        return {
            name: self._pair(B, self._averaged(name, inputs[name]) if name in inputs else None)
            for name, B in blocks.items()
        }

    def _averaged(self, parameter: str, A: Tensor) -> Tensor:
        return A if parameter in self._divided else A.div_(self._count(parameter))

    def state(self) -> dict[str, Tensor | KroneckerFactors]:
        """B, and A before the division by its count of positions, or of samples."""
        found: dict[str, Tensor | KroneckerFactors] = {}
        for name, B in self._blocks().items():
            found[name] = self._pair(B, self._A.get(name))
            if name in self._A:
                found[companion(f"{name}/A", _COUNT)] = torch.tensor(self._count(name))
        return found

    def _blocks(self) -> dict[str, Tensor]:
        """B of every parameter that has a form; it is given away."""
        self._close_part()
        if self._joint:
            for weight in [name for name in self._B if name not in self.missing]:
                bias = self._bias_of(weight)
                if bias is not None:
                    self._B.pop(bias, None)
                    self.missing[bias] = _in_block_of(weight)
        # The gradient carries 1/Z, and s only 1/√Z.
        empirical = self.setting.options.get("fisher") == "empirical"
        scale = self.setting.Z if empirical else 1 / self.setting.draws
        # Of a parameter left out in one part, the others' sums are of no use.
        found, self._B = self._B, {}
        found = {name: B for name, B in found.items() if name not in self.missing}
        return found if scale == 1 else {name: B.mul_(scale) for name, B in found.items()}

    def _count(self, parameter: str) -> int:
        """What A's sum is divided by."""
        return self._positions[parameter] if self._approximation == "expand" else self.setting.N

    def _reason(self, contribution: Contribution) -> str | None:
        """Why there is no Kronecker form, or None."""
        if not isinstance(contribution, ClosedForm):
            return _UNREACHED if isinstance(contribution, Absent) else _FALLBACK
        return self._obstacle(contribution)

    def _weight_of(self, bias: str) -> str | None:
        """The weight whose block takes in this bias."""
        if self._weights is None:
            self._weights = {}
            for weight in self.setting.uses:
                found = self._bias_of(weight)
                if found is not None and found != weight and found not in self._weights and self._has_form(weight):
                    self._weights[found] = weight
        return self._weights.get(bias)

    def _has_form(self, weight: str) -> bool:
        uses = list(self.setting.uses[weight])
        return all(_is_whole(p.use) for p in uses) and self._obstacle_in_rows(uses) is None

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

    def _obstacle(self, contribution: ClosedForm) -> str | None:
        if (single := contribution.single()) is not None:
            prepared, g, rule = single
            if rule.factor_outputs(prepared.use.role, g[:1]) is None:
                return _no_form([prepared.tap.name])
            return self._obstacle_in_rows([prepared]) if prepared.use.role == "weight" else None
        uses = [p for p, _ in contribution.uses]
        outputs = [p.tap.rule.factor_outputs(p.use.role, g[:1]) for p, g in contribution.uses if p.tap.rule is not None]
        if any(o is None for o in outputs):
            kinds = sorted({p.tap.name for p, o in zip(uses, outputs, strict=True) if o is None})
            return _no_form(kinds)
        if any(not _is_whole(p.use) for p in uses):
            return "no Kronecker form: a layer consumes only a part or a rearrangement of it"
        roles = {p.use.role for p in uses}
        shapes = {
            (o.shape[0], o.shape[3], *_inputs_first(p)) for p, o in zip(uses, outputs, strict=True) if o is not None
        }
        if len(roles) > 1 or len(shapes) > 1:
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

    def _add_inputs(self, parameter: str, uses: list[PreparedUse]) -> None:
        """Add a part's Σ x xᵀ (under "reduce" of inputs averaged over positions), and count its positions."""
        if uses[0].use.role != "weight":
            return
        joint = self._joint and self._bias_of(parameter) is not None
        # Padding rows of zeros (irregular attributions) do not count as positions.
        rows = sum(positions(p) for p in uses)
        form = averaged_moment if self._approximation == "reduce" else summed_moment
        self._positions[parameter] = self._positions.get(parameter, 0) + rows
        factor = 1.0
        if len(self.rows) == self.setting.N and not self.setting.part:  # there is no other part
            self._divided.add(parameter)
            factor = 1 / self._count(parameter)
        A = form(uses, self.setting.budget_bytes, joint=joint, factor=factor)
        self._A[parameter] = self._A[parameter].add_(A) if parameter in self._A else A

    @staticmethod
    def _pair(B: Tensor, A: Tensor | None) -> KroneckerFactors:
        if B.shape[0] > 1:
            return KroneckerFactors(B, A)
        return KroneckerFactors(B[0], None if A is None else A[0])


class Factors(Merger):
    """B adds up, and so does A before its division by the count."""

    companions = (_COUNT,)

    def join(self, before: State, N: int, state: State, n: int) -> State:
        for name, tensor in state.items():
            before[name] += tensor
        return before

    def result(self, state: State, N: int) -> Tensor:
        return state[OWN] / state[_COUNT] if _COUNT in state else state[OWN]


def _in_block_of(weight: str) -> str:
    return f"its block is part of that of {weight}, after the weight's columns"


def _no_form(operators: Sequence[str]) -> str:
    return f"no Kronecker form for {', '.join(operators)}"


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
    return _holds_in_order(use.watched.index) or _holds_transposed(use.watched.index)


def _inputs_first(prepared: PreparedUse) -> tuple[bool, ...]:
    """Whether a weight's first axis, as it is stored, is the layer's inputs; a bias has none."""
    if prepared.use.role != "weight" or prepared.tap.rule is None:
        return ()
    index = prepared.use.watched.index
    turned = not _holds_in_order(index) and _holds_transposed(index)
    return (prepared.tap.rule.inputs_first != turned,)


def _holds_in_order(index: Tensor | Derivation | None) -> bool:
    """Whether a gather has the parameter's elements in their own order, whatever its shape."""
    if index is None or isinstance(index, Derivation):
        return index is None
    return torch.equal(index.reshape(-1), torch.arange(index.numel(), device=index.device))


def _holds_transposed(index: Tensor | Derivation | None) -> bool:
    return isinstance(index, Tensor) and index.dim() == 2 and _holds_in_order(index.T)


KFAC = Extension(
    "kfac",
    "Kronecker factors with sampled columns",
    "factors",
    "B [out, out], A [in, in]",
    "block ≈ B ⊗ A; s with E s sᵀ = H_n, M draws averaged: from targets drawn from the model's likelihood "
    "(cross-entropy, squared error, bce_with_logits), else root(H_n) times normal numbers",
    "Martens & Grosse 2015, eq. 1; Grosse & Martens 2016; Eschenhagen et al. 2023",
    "sampled",
    Kronecker,
    {
        "mc_samples": MC_SAMPLES,
        "approximation": APPROXIMATION,
        "fisher": _FISHER,
        "joint_bias": JOINT_BIAS,
        "strict": STRICT,
    },
    _columns,
    merging="sum",
    degree=1.0,
    merger=Factors,
    any_root=True,
)
KFLR = Extension(
    "kflr",
    "Kronecker factors with the exact columns of the loss's Hessian",
    "factors",
    "B [out, out], A [in, in]",
    "block ≈ B ⊗ A; s from all columns of the square root of H_n",
    "Botev, Ritter & Barber 2017; Eschenhagen et al. 2023",
    "exact",
    Kronecker,
    {"approximation": APPROXIMATION, "joint_bias": JOINT_BIAS, "strict": STRICT},
    merging="sum",
    degree=1.0,
    merger=Factors,
    any_root=True,
)
