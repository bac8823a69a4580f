"""One request from inputs to results: one forward pass, then backward passes to the taps, reduced as they come."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature_engine.against import take_up_others
from curvature_engine.batches import take_batch
from curvature_engine.budget import Budget, check_whole_number
from curvature_engine.closed_form import Relief
from curvature_engine.errors import DoesNotFit, EngineError, lacks_memory
from curvature_engine.grad_mode import with_gradients
from curvature_engine.losses import BoundLoss, LossSpec
from curvature_engine.orders import Order, Progress
from curvature_engine.pages import PAGES, drop, with_room
from curvature_engine.parts import DataSetPart, check_mergeable
from curvature_engine.passes import BackwardPasses
from curvature_engine.plans import Plan, size
from curvature_engine.precision import dtype_name
from curvature_engine.preparation import Limits, Prepared, Preparer
from curvature_engine.products import Multiplying, check_precision
from curvature_engine.program import Inputs, Parameter, load
from curvature_engine.recovery import Attempt
from curvature_engine.replay_keys import key_of
from curvature_engine.replays import replays_of
from curvature_engine.requests import Request, parse_requests
from curvature_engine.results import Analysis, Group
from curvature_engine.rounding_error import RoundingError, rounding_error
from curvature_engine.selection import Wanted, select
from curvature_engine.speculation import answer
from curvature_engine.stores import ResultStore
from curvature_engine.version import __version__


@with_gradients
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
    parameters: Wanted = "trainable",
    eval: bool = True,
    progress: Progress | None = None,
    budget_bytes: int | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    verify: bool = False,
    part: DataSetPart | None = None,
    most_bytes: int | None = None,
    precision: str = "float32",
    channels_last: bool = False,
) -> Analysis:
    """Compute extensions of one model on one batch.

    Args:
        model: a program from `load`, a path, a ScriptModule, or an nn.Module.
        inputs: one tensor, a tuple of positional inputs, or a mapping by name.
        targets: what the loss compares the outputs with.
        extensions: names, or mappings with `name`, `label`, `options`.
        loss: None (cross-entropy for integer targets on [N, C] outputs), a name, a mapping with name and options, one
            of torch's loss modules, or a TorchScript function of (outputs, targets) giving each sample's loss [N]
            (scripted, or its file's path or bytes).
        reduction: "mean" (default) or "sum".
        seed: of the Monte-Carlo draws.
        device: where to compute; a program stays where it was loaded.
        parameters: "trainable" (requires_grad), "all", or one or several patterns of names, e.g. "layer4.*".
        eval: put the model into eval mode (not for a program, which has its mode).
        progress: called with (columns done, columns in all; each parameter counts as one for Hessians).
        budget_bytes: memory for what the analysis makes: graph, gradients, intermediates, results; by default half of
            the device's. Draws do not depend on it.
        results_dir: a folder for results that exceed the budget: each becomes a file `{label}.safetensors`, written as
            it is made, whose tensors are read when they are used. Without one they lie in temporary files without
            names.
        verify: judge the path anew, whatever verdict is kept of it, and hold the summed contributions of every
            parameter, by closed form or fallback, against the ordinary gradient, for every column that is propagated
            back (not the Hessian's second derivatives of the model, nor KFRA's averaged matrices). A mismatch raises
            `verification_failed`.
        part: says that the batch is a part of a data set: what comes is for `merge`.
        most_bytes: how much memory there is for what the plan needs at its peak.
        precision: how float32 matrices are multiplied: in "float32"; or faster, in "tf32" (CUDA, from Ampere on:
            factors rounded to 10 bits after the point) or in "bf16" (7 bits; CUDA, and CPUs with such products). Sums
            are of float32 numbers in any case, and so are the run-time checks. What it costs is measured:
            `Analysis.precision_error`.
        channels_last: lay images and the weights of convolutions out with their channels last in memory.

    Returns:
        Results by label; every tensor is at least float32.

    Raises:
        EngineError: on anything that keeps the numbers from being exact, with code, message, param and remedy.
        DoesNotFit: where the plan needs more than `most_bytes`.
    """
    requests = parse_requests(extensions)
    spec = LossSpec.parse(loss, reduction)
    check_whole_number("seed", seed, -(2**63))
    _check_part(part, requests, spec)
    program = load(model, device=device, eval=eval)
    if precision != "float32":
        check_precision(precision, program.device, program.dtypes)
    budget = Budget.of(budget_bytes, program.device)
    order = Order(program, requests, seed, progress, budget, bool(verify), part, precision, bool(channels_last))
    folder = None if results_dir is None else Path(results_dir)
    return _Analyzer(order, spec, parameters, most_bytes, folder).run(inputs, targets)


@with_gradients
def plan(
    model: Any,
    inputs: Inputs,
    targets: Tensor,
    extensions: Sequence[Any],
    *,
    loss: Any = None,
    reduction: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    parameters: Wanted = "trainable",
    eval: bool = True,
    budget_bytes: int | None = None,
    part: DataSetPart | None = None,
    precision: str = "float32",
    channels_last: bool = False,
) -> Plan:
    """What `analyze` would do with the same arguments: methods, costs, memory.

    Runs the forward pass and the probe, which finds what methods there are, and none of the columns.

    Raises:
        EngineError: as `analyze` before its first column.
    """
    requests = parse_requests(extensions)
    spec = LossSpec.parse(loss, reduction)
    check_whole_number("seed", seed, -(2**63))
    _check_part(part, requests, spec)
    program = load(model, device=device, eval=eval)
    if precision != "float32":
        check_precision(precision, program.device, program.dtypes)
    budget = Budget.of(budget_bytes, program.device)
    order = Order(program, requests, seed, None, budget, False, part, precision, bool(channels_last))
    return _Analyzer(order, spec, parameters).plan(inputs, targets)


class _Analyzer:
    def __init__(
        self,
        order: Order,
        spec: LossSpec,
        parameters: Wanted,
        most_bytes: int | None = None,
        results_dir: Path | None = None,
    ) -> None:
        self.order, self.spec, self.parameters, self.most_bytes = order, spec, parameters, most_bytes
        self.results_dir = results_dir
        self.program, self.requests, self.seed = order.program, order.requests, order.seed
        self.warnings = order.warnings
        self._plan: Plan | None = None
        self._restarts = 0
        self.columns_done = 0

    def run(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """Compute: by a graph of an earlier analysis of the kind, where there is one."""
        key = key_of(self.order, self.spec, self.parameters, self.most_bytes, inputs, targets)
        if key is None:
            return self.in_pieces(inputs, targets)
        return replays_of(self.program).analysis(self, self.order, key, inputs, targets)

    def once(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """Compute as a whole; raises what comes."""
        order = replace(self.order, progress=None, judged=set())
        again = _Analyzer(order, self.spec, self.parameters, self.most_bytes, None)
        attempt = Attempt(order.budget)
        again._begin(attempt)
        return again._attempt(inputs, targets, attempt.limits)

    def leave_room(self, plan: Plan) -> None:
        """Have no more memory wait than what is planned leaves."""
        if self.program.device.type == "cpu":
            PAGES.allow(self.order.budget.idle_bytes)
            _leave_room(plan)

    def in_pieces(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """Compute, in smaller and smaller pieces where memory runs out."""
        if self.program.device.type == "cpu":
            PAGES.allow(self.order.budget.idle_bytes)
        attempt: Attempt | None = Attempt(self.order.budget)
        dropped = False
        while attempt is not None:
            self._begin(attempt)
            try:
                return self._attempt(inputs, targets, attempt.limits)
            except (EngineError, RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                again = drop() > 0 and not dropped
            _let_go(self.program.device)  # here the error is gone, and with it all that its traceback held
            if again:  # nothing is to be smaller for what waited between analyses
                dropped = True
                continue
            attempt = attempt.next(targets.shape[0] if targets.dim() else 1, self._plan)
        raise EngineError(
            "out_of_memory",
            "memory ran out in the smallest pieces that the computation can be divided into",
            remedy="use a smaller batch, fewer extensions or parameters, or a machine with more memory",
        )

    def _attempt(self, inputs: Inputs, targets: Tensor, limits: Limits) -> Analysis:
        # A function of its own: when it fails, its variables go, and with them the graph.
        with self._prepared(inputs, targets, limits) as prepared:
            return self._analysis(prepared, targets, self.results_dir)

    def plan(self, inputs: Inputs, targets: Tensor) -> Plan:
        return with_room(lambda: self._planned(inputs, targets))

    def _planned(self, inputs: Inputs, targets: Tensor) -> Plan:
        with self._prepared(inputs, targets, Limits()) as prepared:
            return prepared.plan

    def _begin(self, attempt: Attempt) -> None:
        self.order = replace(
            self.order, budget=attempt.budget, warnings=list(attempt.notes), relief=Relief(), against={}
        )
        self.warnings, self._plan, self._restarts = self.order.warnings, None, len(attempt.notes)

    @contextmanager
    def _prepared(self, inputs: Inputs, targets: Tensor, limits: Limits) -> Iterator[Prepared]:
        order = self.order
        inputs, targets = take_batch(inputs, targets, self.program.device, of_images=order.channels_last)
        selected = select(self.program, self.parameters)
        if order.part is not None:
            _check_names(selected)
        laid_out = self.program.channels_last() if order.channels_last else nullcontext()
        with Multiplying(order.precision, self.program.device), laid_out, _differentiable(selected):
            take_up_others(self.order, self.spec, selected)
            yield Preparer(self.order, self.spec, selected).prepare(inputs, targets, limits)

    @contextmanager
    def _store(self, plan: Plan, work: BackwardPasses, results_dir: Path | None) -> Iterator[ResultStore]:
        """Where results lie: those that the plan streams in files of `results_dir`, or else in nameless ones."""
        if not plan.streamed:
            yield ResultStore()
            return
        folder = Path(tempfile.mkdtemp(prefix="curvature-")) if results_dir is None else results_dir
        _check_room(plan, folder)
        store = ResultStore(folder, work.layouts(plan.streamed))
        try:
            yield store
            if results_dir is None:
                self.warnings.append(
                    f"{', '.join(plan.streamed)} exceed the budget and lie in files without names in "
                    f"{folder.parent}; results_dir= names another folder"
                )
                store.hide()
            else:
                store.close()
        except BaseException:
            store.discard()
            raise
        finally:
            if results_dir is None:
                folder.rmdir()

    def _analysis(self, prepared: Prepared, targets: Tensor, results_dir: Path | None) -> Analysis:
        bound, work = prepared.bound, prepared.work
        value = bound.contributions().sum()
        self._warn(used_dropout=prepared.used_dropout)
        first_warnings = len(self.warnings)
        groups = self._groups()
        self._fill_outputs(groups, bound)
        self._plan = prepared.plan
        if self.most_bytes is not None and prepared.plan.peak_bytes > self.most_bytes:
            raise DoesNotFit(prepared.plan.peak_bytes, self.most_bytes)
        if work is not None:
            _leave_room(prepared.plan)
            with self._store(prepared.plan, work, results_dir) as store:
                self.columns_done = work.open(store, len(prepared.division.sizes))
                for part in prepared.parts():
                    part.compute()
                work.fill(groups, store)
        if self.order.relief.halvings:
            self.warnings.append(
                f"memory ran out: individual gradients were written out in blocks halved "
                f"{self.order.relief.halvings} times"
            )
        if not answer(torch.isfinite(value)):  # only now: reading it waits for the device
            self.warnings.insert(
                first_warnings, f"the loss is {float(value)}: results that depend on it are not finite"
            )
        error = rounding_error(prepared, targets) if self.order.is_reordered else None
        self._finish(groups, prepared, error)
        info: dict[str, Any] = {
            "loss_name": self.spec.name,
            "loss_options": dict(self.spec.options),
            "loss_output": self.spec.output,
            "reduction": self.spec.reduction,
            "Z": bound.Z,
            "seed": self.seed,
            "dtype": dtype_name(prepared.outputs.dtype),
            "device": str(self.program.device),
            "engine_version": __version__,
            "format": self.program.format,
            "aliases": dict(self.program.aliases),
            "precision": self.order.precision,
            "channels_last": self.order.channels_last,
        }
        if error is not None:
            info["precision_error"] = error.to_dict()
        if self.order.part is not None:
            info["part"] = {
                "first_sample": bound.first_sample,
                "samples": bound.N,
                "mean_Z": bound.Z_under_mean,
                "path": prepared.path,
                "probed": prepared.probed,
            }
        return Analysis(value, groups, self.warnings, info, prepared.plan, error)

    def _warn(self, *, used_dropout: bool) -> None:
        self.warnings.extend(self.program.front.notes)
        if self.program.was_training and not self.program.keeps_training:
            self.warnings.append("the model was in training mode; an eval-mode copy was analyzed (eval=True)")
        if used_dropout:
            self.warnings.append("dropout was active (eval=False): results belong to one random mask")

    def _groups(self) -> dict[str, Group]:
        return {
            r.label: Group(
                r.label, r.extension.name, r.options, r.extension.kind, r.convention, aliases=self.program.aliases
            )
            for r in self.requests
        }

    def _fill_outputs(self, groups: dict[str, Group], bound: BoundLoss) -> None:
        for request in self.requests:
            if request.extension.name == "batch_loss":
                groups[request.label].tensors[request.label] = bound.contributions()
            elif request.extension.name == "outputs":
                groups[request.label].tensors[request.label] = bound.outputs.clone()

    # Provenance

    def _finish(self, groups: dict[str, Group], prepared: Prepared, error: RoundingError | None) -> None:
        work = prepared.work
        for request in self.requests:
            group = groups[request.label]
            if group.file is None:
                group.fill(group.by_parameter)
            common = self._provenance(request, prepared)
            by_columns = request.extension.accumulator is not None
            for key, dtype in _formats(group).items():
                parameter = key.rpartition("#")[0] or key if self.order.part is not None else key
                parameter = parameter if parameter in group.by_parameter else parameter.rpartition("/")[0]
                group.provenance[key] = {
                    "method": work.method(request, parameter) if work is not None and by_columns else "autograd",
                    **common,
                    "dtype": dtype_name(dtype),
                    "precision_error": None if error is None else error.of(parameter),
                }

    def _provenance(self, request: Request, prepared: Prepared) -> dict[str, Any]:
        """What holds for all tensors of a request."""
        work, sampled = prepared.work, request.extension.columns == "sampled"
        against = self.order.against.get(request.label)
        return {
            "reduction": self.spec.reduction,
            "Z": prepared.bound.Z,
            "scale": request.options.get("scale", "loss"),
            "approximation": request.options.get("approximation"),
            "seed": self.seed if sampled else None,
            "mc_samples": request.options.get("mc_samples") if sampled else None,
            "device": str(self.program.device),
            "engine_version": __version__,
            "samples_per_chunk": prepared.plan.samples_per_chunk,
            "halvings": self._restarts + self.order.relief.halvings,
            "verified": work is not None
            and work.verified
            and work.verification is not None
            and (against is None or against.work.verified),
            "verification": None if work is None else work.verification_of(request),
            "precision": self.order.precision,
            "channels_last": self.order.channels_last,
        }


def _check_part(part: DataSetPart | None, requests: Sequence[Request], spec: LossSpec) -> None:
    """Refuse what has no result over a data set."""
    if part is not None:
        check_whole_number("first_sample", part.first_sample, 0)
        check_mergeable(requests, spec.reduction)


def _check_names(selected: dict[str, Parameter]) -> None:
    """Refuse names in which the keys of a part's state could not be told apart."""
    if odd := [name for name in selected if "#" in name]:
        raise EngineError(
            "unsupported_model",
            f"over a data set in parts, no parameter's name may hold #; one is called {odd[0]}",
            param=odd[0],
            remedy="rename it, or name others in parameters=",
        )


@contextmanager
def _differentiable(selected: dict[str, Parameter]) -> Iterator[None]:
    """Have the parameters asked for require gradients, as long as it lasts."""
    restore = [t for p in selected.values() for t in p.tensors if not t.requires_grad]
    try:
        for tensor in restore:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in restore:
            tensor.requires_grad_(False)


def _formats(group: Group) -> dict[str, torch.dtype]:
    """Every tensor's number format, in the model's order; of those in a file without reading it."""
    if group.file is not None:
        return {key: place.dtype for key, place in group.file.places.items()}
    return {key: tensor.dtype for key, tensor in group.tensors.items()}


def _check_room(plan: Plan, folder: Path) -> None:
    """Refuse before the work what the disk cannot hold.

    Raises:
        EngineError: `unavailable`.
    """
    needed = sum(r.result_bytes for r in plan.requests if r.streamed)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EngineError(
            "unavailable",
            f"{', '.join(plan.streamed)} need {size(needed)} on disk; {size(free)} are free",
            remedy="ask for fewer parameters (parameters=) or samples, or name a folder on a larger disk",
        )


def _leave_room(plan: Plan) -> None:
    """Have no more memory wait than the budget leaves beside what the plan needs; results may take what waits."""
    results = sum(r.result_bytes for r in plan.requests if not r.streamed)
    PAGES.drop(max(0, plan.budget_bytes - plan.peak_bytes + results))


def _let_go(device: torch.device) -> None:
    gc.collect()
    PAGES.drop()
    if device.type == "cuda":
        torch.cuda.empty_cache()
