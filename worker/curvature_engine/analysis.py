"""One request from inputs to results: one forward pass, then backward passes to the taps, reduced as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature_engine.contributions import (
    Absent,
    ClosedForm,
    Contribution,
    Fallback,
    Materialised,
    PreparedUse,
    prepare_use,
)
from curvature_engine.errors import EngineError
from curvature_engine.extensions import Accumulator, KroneckerFactors, Setting
from curvature_engine.judgement import confirm, judge, random_cotangent, reproducible
from curvature_engine.losses import BoundLoss, LossSpec, accumulation_dtype
from curvature_engine.probe import Verdict
from curvature_engine.program import Forward, Inputs, Parameter, Program, load
from curvature_engine.requests import Request, parse_requests
from curvature_engine.results import Analysis, Group
from curvature_engine.tape import Tape, backward
from curvature_engine.version import __version__

Progress = Callable[[int, int], None]

DEFAULT_BUDGET_BYTES = 256 * 2**20


def analyze(
    model: Any,
    inputs: Inputs,
    targets: Tensor,
    extensions: Sequence[Any],
    *,
    loss: Any = None,
    reduction: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    parameters: str = "trainable",
    eval: bool = True,
    progress: Progress | None = None,
    budget_bytes: int | None = None,
) -> Analysis:
    """Compute extensions of one model on one batch.

    Args:
        model: a program from `load`, a path, a ScriptModule, or an nn.Module.
        inputs: one tensor, a tuple of positional inputs, or a mapping by name.
        targets: what the loss compares the outputs with.
        extensions: names, or mappings with `name`, `label`, `options`.
        loss: None (cross-entropy for integer targets on [N, C] outputs), a name, a mapping, or a loss module.
        reduction: "mean" (default) or "sum".
        seed: of the Monte-Carlo draws.
        device: where to compute; a program stays where it was loaded.
        parameters: "trainable" (requires_grad) or "all".
        eval: put the model into eval mode (not for a program, which has its mode).
        progress: called with (columns done, columns in all).
        budget_bytes: memory for intermediates of one parameter; draws do not depend on it.

    Returns:
        Results by label; every tensor is at least float32.

    Raises:
        EngineError: on anything that keeps the numbers from being exact, with code, message, param and remedy.
    """
    requests = parse_requests(extensions)
    spec = LossSpec.parse(loss, reduction)
    _check_whole_number("seed", seed, -(2**63))
    if budget_bytes is not None:
        _check_whole_number("budget_bytes", budget_bytes, 1)
    program = load(model, device=device, eval=eval)
    return _Analyzer(program, requests, spec, seed, parameters, progress, budget_bytes or DEFAULT_BUDGET_BYTES).run(
        inputs, targets
    )


@dataclass
class _Analyzer:
    program: Program
    requests: list[Request]
    spec: LossSpec
    seed: int
    parameters: str
    progress: Progress | None
    budget_bytes: int

    def run(self, inputs: Inputs, targets: Tensor) -> Analysis:
        self.warnings: list[str] = []
        inputs, targets = self._placed(inputs), self._placed(targets)
        _check_not_empty(inputs, targets)
        selected = self._select()
        restore = [(t, t.requires_grad) for p in selected.values() for t in p.tensors]
        try:
            for tensor, _ in restore:
                tensor.requires_grad_(True)
            return self._run(inputs, targets, selected)
        finally:
            for tensor, required in restore:
                tensor.requires_grad_(required)

    def _run(self, inputs: Inputs, targets: Tensor, selected: dict[str, Parameter]) -> Analysis:
        tape = Tape()
        for parameter in selected.values():
            for tensor in parameter.tensors:
                tape.watch(parameter.name, tensor)
        with torch.random.fork_rng(enabled=self.program.keeps_training):
            if self.program.keeps_training:
                torch.manual_seed(self.seed)
            forward = self.program.run(inputs, tape)
        outputs = _check_outputs(forward.outputs)
        bound = self.spec.bind(outputs, targets)
        value = bound.contributions().sum()
        self._warn(program_loss=value, used_dropout=forward.used_dropout)
        groups = self._groups()
        self._fill_outputs(groups, outputs, bound)
        work = _Work(self, forward, outputs, bound, selected)
        if any(r.extension.columns != "outputs" for r in self.requests):
            work.compute(groups)
        self._finish(groups, bound, work)
        info = {
            "loss_name": self.spec.name,
            "reduction": self.spec.reduction,
            "Z": bound.Z,
            "seed": self.seed,
            "dtype": _name(outputs.dtype),
            "device": str(self.program.device),
            "engine_version": __version__,
            "aliases": dict(self.program.aliases),
        }
        return Analysis(value, groups, self.warnings, info)

    # Preparation

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
                raise EngineError(
                    "invalid_inputs",
                    f"inputs and targets must be dense tensors; got {value.layout} on {value.device}, "
                    f"{_name(value.dtype)}",
                    param="inputs",
                    remedy="call to_dense() or dequantize()",
                )
            return value.detach().to(self.program.device)
        if isinstance(value, tuple | list):
            return type(value)(self._placed(v) for v in value)
        if isinstance(value, dict):
            return {k: self._placed(v) for k, v in value.items()}
        return value

    def _select(self) -> dict[str, Parameter]:
        if self.parameters not in ("trainable", "all"):
            raise EngineError(
                "invalid_option",
                f'parameters must be "trainable" or "all"; got {self.parameters!r}',
                param="parameters",
                remedy="choose one of the two",
            )
        for name, p in self.program.parameters.items():
            if p.tensor.is_complex() and (self.parameters == "all" or any(t.requires_grad for t in p.tensors)):
                raise EngineError(
                    "unsupported_model",
                    f"parameter {name} is complex: curvature is defined for real parameters only",
                    param=name,
                    remedy="keep its real and imaginary parts as two parameters",
                )
        found = {
            name: p
            for name, p in self.program.parameters.items()
            if p.tensor.is_floating_point() and (self.parameters == "all" or any(t.requires_grad for t in p.tensors))
        }
        if not found:
            raise EngineError(
                "no_parameters",
                "no parameter of the model requires a gradient",
                param="parameters",
                remedy='pass parameters="all", or save the model with requires_grad=True',
            )
        return found

    def _warn(self, *, program_loss: Tensor, used_dropout: bool) -> None:
        if self.program.was_training and not self.program.keeps_training:
            self.warnings.append("the model was in training mode; an eval-mode copy was analyzed (eval=True)")
        if used_dropout:
            self.warnings.append("dropout was active (eval=False): results belong to one random mask")
        if not bool(torch.isfinite(program_loss)):
            self.warnings.append(f"the loss is {float(program_loss)}: results that depend on it are not finite")

    def _groups(self) -> dict[str, Group]:
        return {
            r.label: Group(
                r.label, r.extension.name, r.options, r.extension.kind, _convention(r), aliases=self.program.aliases
            )
            for r in self.requests
        }

    def _fill_outputs(self, groups: dict[str, Group], outputs: Tensor, bound: BoundLoss) -> None:
        for request in self.requests:
            if request.extension.name == "batch_loss":
                groups[request.label].tensors[request.label] = bound.contributions()
            elif request.extension.name == "outputs":
                groups[request.label].tensors[request.label] = bound.outputs.clone()

    # Provenance

    def _finish(self, groups: dict[str, Group], bound: BoundLoss, work: "_Work") -> None:
        for request in self.requests:
            group = groups[request.label]
            sampled = request.extension.columns == "sampled"
            for parameter, result in group.by_parameter.items():
                if isinstance(result, KroneckerFactors):
                    group.tensors[f"{parameter}/B"] = result.B.contiguous()
                    if result.A is not None:
                        group.tensors[f"{parameter}/A"] = result.A.contiguous()
                else:
                    group.tensors[parameter] = result.contiguous()
            for key, tensor in group.tensors.items():
                parameter = key if key in group.by_parameter else key.rpartition("/")[0]
                method = work.methods.get(parameter, "autograd")
                group.provenance[key] = {
                    "method": "autograd" if request.extension.accumulator is None else method,
                    "reduction": self.spec.reduction,
                    "Z": bound.Z,
                    "scale": "loss",
                    "approximation": request.options.get("approximation"),
                    "seed": self.seed if sampled else None,
                    "mc_samples": request.options.get("mc_samples") if sampled else None,
                    "dtype": _name(tensor.dtype),
                    "device": str(self.program.device),
                    "engine_version": __version__,
                    "verified": work.verified,
                }


class _Work:
    """The backward passes of one request."""

    def __init__(
        self, analyzer: _Analyzer, forward: Forward, outputs: Tensor, bound: BoundLoss, selected: dict[str, Parameter]
    ) -> None:
        self._analyzer = analyzer
        self._forward = forward
        self._outputs = outputs
        self._bound = bound
        self._selected = selected
        self._gradient = bound.gradient().to(outputs.dtype)
        self._at_hand: dict[int, Tensor | None] = {}
        self.methods: dict[str, str] = {}
        self.verified = False

    def compute(self, groups: dict[str, Group]) -> None:
        """Fill the groups of all extensions that need a backward pass."""
        self._check_differentiable()
        requests = self._analyzer.requests
        accumulators = self._accumulators()
        if accumulators:
            self._prepare()
        self._fill_gradient(groups)
        exact = [(r, a) for r, a in accumulators if r.extension.columns == "exact"]
        sampled = [(r, a) for r, a in accumulators if r.extension.columns == "sampled"]
        first = [(r, a) for r, a in accumulators if r.extension.columns == "gradient"]
        draws = max((int(r.options["mc_samples"]) for r, _ in sampled), default=0)
        total = bool(first) + (self._bound.columns if exact else 0) + draws
        self._done, self._total = 0, total
        if first:
            self._column(self._gradient, [a for _, a in first])
        for v in range(self._bound.columns if exact else 0):
            self._column(self._bound.exact_column(v), [a for _, a in exact])
        for m in range(draws):
            column = self._bound.sampled_column(self._analyzer.seed, m)
            self._column(column, [a for r, a in sampled if m < int(r.options["mc_samples"])])
        for request, accumulator in accumulators:
            group = groups[request.label]
            group.by_parameter = accumulator.finish(int(request.options.get("mc_samples", 1)))
            group.missing = accumulator.missing
        assert len(groups) == len(requests)

    def _check_differentiable(self) -> None:
        if not self._outputs.requires_grad:
            raise EngineError(
                "unsupported_model",
                "the outputs do not depend on any of the parameters asked for",
                param="model",
                remedy="check for no_grad, detach, or integer outputs in the model",
            )

    def _accumulators(self) -> list[tuple[Request, Accumulator]]:
        shapes = {name: p.tensor.shape for name, p in self._selected.items()}
        return [
            (r, r.extension.accumulator(Setting(self._bound.N, shapes, r.options)))
            for r in self._analyzer.requests
            if r.extension.accumulator is not None
        ]

    def _fill_gradient(self, groups: dict[str, Group]) -> None:
        labels = [r.label for r in self._analyzer.requests if r.extension.name == "grad"]
        if not labels:
            return
        leaves = [t for p in self._selected.values() for t in p.tensors]
        gradients = backward(self._outputs, leaves, self._gradient)
        place = 0
        for name, parameter in self._selected.items():
            total = torch.zeros(
                parameter.tensor.shape, dtype=accumulation_dtype(parameter.tensor.dtype), device=parameter.tensor.device
            )
            for gradient in gradients[place : place + len(parameter.tensors)]:
                if gradient is not None:
                    total += gradient
            place += len(parameter.tensors)
            for label in labels:
                groups[label].by_parameter[name] = total

    # The verdict on this path, and each parameter's method

    def _prepare(self) -> None:
        verdict = self._verdict()
        taps = self._forward.tape.taps
        self._uses: dict[str, list[PreparedUse]] = {}
        for name in self._selected:
            uses = [(i, tap, use) for i, tap in enumerate(taps) for use in tap.uses if use.watched.parameter == name]
            closed = all(
                tap.rule is not None and tap.intact and verdict.taps[i].attribution is not None for i, tap, _ in uses
            )
            if name in verdict.mismatched and uses and closed:
                raise EngineError(
                    "verification_failed",
                    f"the closed form of parameter {name} disagrees with ordinary autograd; no result is given",
                    param=name,
                    remedy="please report this model",
                )
            if not closed or name in verdict.mismatched:
                self.methods[name] = "fallback"
                continue
            self.methods[name] = "closed form"
            prepared = []
            for i, tap, use in uses:
                attribution = verdict.taps[i].attribution
                assert attribution is not None
                prepared.append(prepare_use(tap, i, use, attribution))
            self._uses[name] = prepared

    def _verdict(self) -> Verdict:
        verdicts, forward, outputs = self._analyzer.program.verdicts, self._forward, self._outputs
        path = (
            tuple(outputs.shape),
            forward.decisions,
            tuple(self._selected),
            tuple((tap.name, tap.shapes, tap.intact) for tap in forward.tape.taps),
        )
        verdict = None if forward.routed_by_data else verdicts.get(path)
        if verdict is None or not self._confirm(verdict):
            verdict = judge(outputs, forward.tape, self._selected)
            if verdict.finite and verdict.confirmable and not forward.routed_by_data:
                verdicts.keep(path, verdict)
        self.verified = verdict.finite and bool(torch.isfinite(outputs).all())
        if not verdict.finite:
            self._analyzer.warnings.append(
                "some gradient in the model is not finite: results below it are not verified"
            )
        return verdict

    def _confirm(self, verdict: Verdict) -> bool:
        """Whether a kept verdict holds for this batch's rows."""
        # The loss's gradient leaves rows silent that other columns reach, but those do not matter to it.
        only_gradient = all(r.extension.columns in ("outputs", "gradient") for r in self._analyzer.requests)
        cotangent = self._gradient if only_gradient else random_cotangent(self._outputs)
        known = [i for i, tap in enumerate(verdict.taps) if tap.attribution is not None]
        with reproducible(self._outputs.device):
            gradients = self._at_taps(known, cotangent)
            if only_gradient:
                self._at_hand = gradients
            return confirm(verdict, self._outputs, self._forward.tape, cotangent, gradients)

    # Columns

    def _column(self, cotangent: Tensor, accumulators: list[Accumulator]) -> None:
        cotangent = cotangent.to(self._outputs.dtype)
        needed = sorted({u.tap_index for uses in self._uses.values() for u in uses})
        at_hand = self._at_hand if cotangent is self._gradient else {}
        gradients = at_hand if at_hand.keys() >= set(needed) else self._at_taps(needed, cotangent)
        fallbacks = self._fallbacks(cotangent)
        with torch.no_grad():
            for name, parameter in self._selected.items():
                contribution = fallbacks.get(name) or self._closed(name, parameter, gradients)
                for accumulator in accumulators:
                    accumulator.add(name, contribution)
        self._done += 1
        if self._analyzer.progress is not None:
            self._analyzer.progress(self._done, self._total)

    def _at_taps(self, numbers: Sequence[int], cotangent: Tensor) -> dict[int, Tensor | None]:
        """The gradients of some taps' outputs, by the taps' numbers."""
        taps = [self._forward.tape.taps[i] for i in numbers]
        found = backward(self._outputs, [tap.edges[0] for tap in taps], cotangent)
        return {i: tap.shaped([g])[0] for i, tap, g in zip(numbers, taps, found, strict=True)}

    def _closed(self, name: str, parameter: Parameter, gradients: dict[int, Tensor | None]) -> Contribution:
        uses = []
        for prepared in self._uses[name]:
            g = gradients[prepared.tap_index]
            if g is not None:
                uses.append((prepared, prepared.arranged_gradient(g)))
        if not uses:
            return Absent(parameter.tensor, self._bound.N)
        return ClosedForm(uses, parameter.tensor, self._bound.N, self._analyzer.budget_bytes)

    def _fallbacks(self, cotangent: Tensor) -> dict[str, Contribution]:
        """Per-sample gradients of the parameters without closed form: together where they fit the budget."""
        names = [n for n, method in self.methods.items() if method == "fallback"]
        if not names:
            return {}
        N = self._bound.N
        tensors = {n: self._selected[n].tensors for n in names}
        size = sum(t[0].numel() * 8 * N for t in tensors.values())
        if size > self._analyzer.budget_bytes:
            return {n: Fallback(self._outputs, tensors[n], cotangent) for n in names}
        flat = [t for n in names for t in tensors[n]]
        stacks = [torch.zeros((N, *t.shape), dtype=accumulation_dtype(t.dtype), device=t.device) for t in flat]
        restricted = torch.zeros_like(cotangent)
        for n in range(N):
            restricted[n] = cotangent[n]
            found = backward(self._outputs, flat, restricted)
            restricted[n] = 0
            for stack, gradient in zip(stacks, found, strict=True):
                if gradient is not None:
                    stack[n] = gradient
        result: dict[str, Contribution] = {}
        for name in names:
            parts = [stacks.pop(0) for _ in tensors[name]]
            result[name] = Materialised(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
        return result


def _check_whole_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise EngineError(
            "invalid_option",
            f"{name} must be a whole number from {least} to {2**63 - 1}; got {value!r}",
            param=name,
            remedy="pass an int",
        )


def _check_not_empty(inputs: Any, targets: Any) -> None:
    if not isinstance(targets, Tensor):
        raise EngineError(
            "invalid_targets",
            f"targets must be one tensor; got {type(targets).__name__}",
            param="targets",
            remedy="pass a tensor with one row per sample",
        )
    values = (
        list(inputs.values())
        if isinstance(inputs, dict)
        else list(inputs)
        if isinstance(inputs, tuple | list)
        else [inputs]
    )
    if not values:
        raise EngineError("invalid_inputs", "there are no inputs", param="inputs", remedy="give what forward takes")
    if targets.numel() == 0 or any(isinstance(v, Tensor) and v.numel() == 0 for v in values):
        raise EngineError(
            "empty_batch",
            "the batch is empty: a tensor without elements came",
            param="batch",
            remedy="give at least one sample",
        )


def _check_outputs(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        return outputs
    came = _name(outputs.dtype) + " tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise EngineError(
        "unsupported_outputs",
        f"the model must return one floating-point tensor [N, …]; it returned a {came}",
        param="model",
        remedy="wrap the model so that forward returns the tensor that enters the loss",
    )


def _convention(request: Request) -> str:
    extension = request.extension
    text = f"{extension.shape}: {extension.formula}"
    approximation = request.options.get("approximation")
    if approximation == "backpack":
        text += "; approximation backpack overestimates a convolution's block by about its number of positions"
    elif approximation is not None:
        text += f"; approximation {approximation}"
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
