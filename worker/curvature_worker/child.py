"""The confined process that opens models and runs the engine. It trusts nobody and is trusted by nobody."""

import json
import logging
import math
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import curvature_engine as engine
from curvature_engine.budget import default_budget_bytes
from curvature_engine.errors import memory_ran_out
from curvature_engine.kernels import choice
from curvature_protocol.names import INPUTS, TARGETS
from curvature_protocol.requests import referenced_batch
from curvature_worker import heap
from curvature_worker.channel import MAX_FRAME_BYTES, Channel, ChannelClosed
from curvature_worker.inbox import PARTS, batch_name

_PROGRESS_SECONDS = 0.1
_IDLE_SECONDS = 5.0
"""After which memory for an order like the last one is no longer kept."""
_NO_ROOM = ("No space left", "File too large", "quota exceeded")


def serve(channel: Channel, isolation: str, options: dict[str, Any]) -> None:
    """Say ready, then answer orders until the channel closes."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.simplefilter("ignore")
    try:
        catalogue = engine.catalogue()
        device = _check_device(options["device"])
        if options.get("threads"):
            torch.set_num_threads(int(options["threads"]))
    except engine.EngineError as error:
        channel.send({"event": "error", "code": error.code, "message": error.message, "remedy": error.remedy})
        return
    if "seccomp" in isolation or "landlock" in isolation:
        choice.switch_off("a confined process may start no compiler")
    programs = Programs(device, Path(options["inbox"]), options["programs_kept"], options["programs_bytes"])
    budget_bytes = options.get("budget_bytes") or default_budget_bytes(device)
    child = Child(channel, programs, Path(options["inbox"]), Path(options["outbox"]), budget_bytes)
    _warm_up(device)
    channel.send(
        {
            "event": "ready",
            "isolation": isolation,
            "catalogue": catalogue,
            "device": str(device),
            "budget_bytes": budget_bytes,
        }
    )
    with suppress(ChannelClosed):
        child.work()


class Programs:
    """Loaded programs by the model's hash and mode; the least recently used ones go first."""

    def __init__(self, device: torch.device, folder: Path, kept: int, kept_bytes: int) -> None:
        self._device, self._folder = device, folder
        self._kept, self._kept_bytes = kept, kept_bytes
        self._loaded: OrderedDict[tuple[str, bool], tuple[engine.Program, int]] = OrderedDict()

    def __contains__(self, key: tuple[str, bool]) -> bool:
        return key in self._loaded

    def load(self, sha256: str, *, eval: bool) -> engine.Program:
        """The program, loaded now if it is not there."""
        key = (sha256, eval)
        if key not in self._loaded:
            path = self._folder / sha256
            size = path.stat().st_size
            self._make_room(size)
            self._loaded[key] = engine.load(path, device=self._device, eval=eval), size
        self._loaded.move_to_end(key)
        return self._loaded[key][0]

    def _make_room(self, size: int) -> None:
        while self._loaded and (
            len(self._loaded) >= self._kept or size + sum(s for _, s in self._loaded.values()) > self._kept_bytes
        ):
            self._loaded.popitem(last=False)


class Child:
    """Runs orders one after another."""

    def __init__(self, channel: Channel, programs: Programs, inbox: Path, outbox: Path, budget_bytes: int) -> None:
        self._channel, self._programs, self._inbox, self._outbox = channel, programs, inbox, outbox
        self._budget_bytes = budget_bytes
        self._progress_at = 0.0
        self._sizes: tuple[Any, ...] = ()
        """What the last order was: kind, model, and size of the batch's file; empty when nothing of it is kept."""
        self._answers = {
            "analysis": self._run,
            "shard": self._run,
            "merge": self._merge,
            "plan": self._plan,
            "inspection": self._inspect,
            "digest": self._digest,
        }

    def work(self) -> None:
        """Answer orders until the channel closes.

        Raises:
            ChannelClosed: when it does.
        """
        while True:
            order = self._channel.receive(_IDLE_SECONDS if self._sizes else None)
            if order is None:
                heap.give_back()
                self._sizes = ()
            else:
                self.answer(order)

    def answer(self, order: dict[str, Any]) -> None:
        """Run one order and send its reply: `done` or `error`."""
        try:
            self._make_room(order)
            self._channel.send(self._answers[order["kind"]](order))
        except ChannelClosed:
            raise
        except engine.EngineError as error:
            if isinstance(error, engine.DoesNotFit):
                self._refuse(error.code, error.message, error.param, error.remedy, needed_bytes=error.needed_bytes)
            elif _lacked_memory(error):
                self._refuse_for_memory()
            else:
                self._refuse(error.code, error.message, error.param, error.remedy)
        except Exception as error:  # noqa: BLE001 (the model's or the engine's failure must not end the child)
            self._explain(error)

    def _make_room(self, order: dict[str, Any]) -> None:
        """Let go of memory that waits for an order like the last one, if that is not what comes.

        Else it is there beside the order's batch, as the last results were beside the last batch.
        """
        batch = None if order.get("batch") is None else self._inbox / batch_name(order["batch"])
        sizes = (order["kind"], order.get("model"), batch and batch.exists() and batch.stat().st_size)
        if sizes != self._sizes:
            heap.give_back()
        self._sizes = sizes

    def _explain(self, error: Exception) -> None:
        """Sort out what failed below the engine; an operator finds the traceback in the worker's log."""
        if _lacked_memory(error):
            self._refuse_for_memory()
            return
        text = str(error)
        if any(sign in text for sign in _NO_ROOM):
            self._refuse("unavailable", "the worker's disk is full", None, "tell the operator, and try again later")
            return
        traceback.print_exc()
        reason = text.splitlines()[0] if text else ""
        self._refuse("internal_error", f"the engine failed: {type(error).__name__}: {reason}", None, None)

    def _refuse_for_memory(self) -> None:
        self._refuse("out_of_memory", "memory ran out", None, "use a smaller batch or fewer extensions")

    def _refuse(self, code: str, message: str, param: str | None, remedy: str | None, **more: Any) -> None:
        refusal = {"event": "error", "code": code, "message": message, "param": param, "remedy": remedy}
        self._channel.send({**refusal, **more})

    def _inspect(self, order: dict[str, Any]) -> dict[str, Any]:
        return _report(engine.inspect_program(self._program(order)).to_dict())

    def _digest(self, order: dict[str, Any]) -> dict[str, Any]:
        return {"event": "done", "digest": engine.digest(self._program(order))}

    def _merge(self, order: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        parts = [self._part(told) for told in json.loads((self._inbox / PARTS).read_bytes())]
        merged = engine.merge(
            order["extensions"],
            parts,
            results_dir=self._outbox,
            progress=lambda done, total: self._tell("merging", done, total),
        )
        return {
            "event": "done",
            "loss": merged.loss if math.isfinite(merged.loss) else None,
            "groups": [self._store(group) for group in merged.groups.values()],
            "info": merged.info,
            "warnings": merged.warnings,
            "timings_ms": {"compute": 1e3 * (time.perf_counter() - begun)},
        }

    def _part(self, told: dict[str, Any]) -> engine.PartResult:
        groups = {
            label: engine.PartGroup(
                missing=group["missing"],
                provenance=group["provenance"],
                path=None if group["file"] is None else self._inbox / group["file"],
                layout={name: (tuple(shape), dtype) for name, (shape, dtype) in group["layout"].items()},
            )
            for label, group in told["groups"].items()
        }
        return engine.PartResult(told["loss"], told["info"], groups, told["warnings"])

    def _plan(self, order: dict[str, Any]) -> dict[str, Any]:
        request = order["request"]
        program = self._program(order)
        inputs, targets = read_batch(self._inbox / batch_name(order["batch"]))
        plan = engine.plan(
            program,
            inputs,
            targets,
            self._with_batches(request["extensions"], {order["batch"]: (inputs, targets)}),
            loss=self._loss(request["loss"]),
            reduction=request["reduction"],
            seed=request["seed"],
            parameters=request["parameters"],
            budget_bytes=self._budget_bytes,
            precision=request["precision"],
            channels_last=request["channels_last"],
        )
        return _report(plan.to_dict())

    def _program(self, order: dict[str, Any]) -> engine.Program:
        key = (order["model"], order["request"]["eval"])
        if key not in self._programs:
            self._channel.send({"event": "progress", "phase": "loading", "done": 0, "total": 0})
        return self._programs.load(key[0], eval=key[1])

    def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        request = order["request"]
        begun = time.perf_counter()
        program = self._program(order)
        inputs, targets = read_batch(self._inbox / batch_name(order["batch"]))
        extensions = self._with_batches(request["extensions"], {order["batch"]: (inputs, targets)})
        loaded = time.perf_counter()
        analysis = engine.analyze(
            program,
            inputs,
            targets,
            extensions,
            loss=self._loss(request["loss"]),
            reduction=request["reduction"],
            seed=request["seed"],
            parameters=request["parameters"],
            verify=request["verify"],
            progress=self._report,
            budget_bytes=self._budget_bytes,
            results_dir=self._outbox,
            part=None if order["part"] is None else engine.DataSetPart(order["part"]["first_sample"]),
            most_bytes=order["most_bytes"],
            precision=request["precision"],
            channels_last=request["channels_last"],
        )
        computed = time.perf_counter()
        for extension in request["extensions"]:  # into the manifest goes a batch's hash, as it was asked for
            references = {k: v for k, v in extension["options"].items() if referenced_batch(v) is not None}
            analysis.groups[extension["label"]].options.update(references)
        groups = [self._store(group) for group in analysis.groups.values()]
        written = time.perf_counter()
        value = float(analysis.loss)
        return {
            "event": "done",
            "loss": value if math.isfinite(value) else None,
            "groups": groups,
            "info": analysis.info,
            "warnings": analysis.warnings,
            "timings_ms": {
                "load": 1e3 * (loaded - begun),
                "compute": 1e3 * (computed - loaded),
                "write": 1e3 * (written - computed),
            },
        }

    def _with_batches(self, extensions: list[dict[str, Any]], known: dict[str, Any]) -> list[dict[str, Any]]:
        """The extensions with the batches that their options refer to; `known` holds those read already, by hash."""
        found = []
        for extension in extensions:
            options = dict(extension["options"])
            for option, value in options.items():
                sha256 = referenced_batch(value)
                if sha256 is None:
                    continue
                if sha256 not in known:
                    known[sha256] = read_batch(self._inbox / batch_name(sha256), f"{extension['label']}'s {option}")
                options[option] = known[sha256]
            found.append({**extension, "options": options})
        return found

    def _loss(self, asked: dict[str, Any] | None) -> dict[str, Any] | None:
        """The loss as the engine takes it: a function's file is opened here, where nothing else can be reached."""
        if asked is None or "file" not in asked:
            return asked
        function = (self._inbox / asked["file"]).read_bytes()
        return {"name": "custom", "function": function, "options": {"output": asked["output"]}}

    def _report(self, done: int, total: int) -> None:
        self._tell("computing", done, total)

    def _tell(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_SECONDS:
            self._progress_at = now
            self._channel.send({"event": "progress", "phase": phase, "done": done, "total": total})

    def _store(self, group: engine.Group) -> dict[str, Any]:
        appended = group.appended
        if group.file is None and appended is None:  # else it is written already, or stays where it is
            engine.save_tensors(self._outbox / f"{group.label}.safetensors", group.tensors)
        return {
            "label": group.label,
            "extension": group.extension,
            "options": group.options,
            "kind": group.kind,
            "convention": group.convention,
            "missing": group.missing,
            "provenance": group.provenance,
            "appended": None
            if appended is None
            else {"axis": appended.axis, "factor": appended.factor, "layout": appended.layout},
        }


def _report(found: dict[str, Any]) -> dict[str, Any]:
    """The reply with a report.

    Raises:
        EngineError: `unsupported_model` if it is too long for the worker to listen to.
    """
    reply = {"event": "done", "report": found}
    if (size := len(json.dumps(reply))) > MAX_FRAME_BYTES:
        raise engine.EngineError(
            "unsupported_model",
            f"the report has {size} bytes; {MAX_FRAME_BYTES} are told",
            remedy="ask for fewer extensions, or name parameters",
        )
    return reply


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    while error is not None:
        if memory_ran_out(error):
            return True
        error = error.__cause__
    return False


def read_batch(path: Path, role: str = "") -> tuple[Any, torch.Tensor]:
    """Inputs and targets of a batch file: `inputs`, or `inputs.0` …, or `inputs.<name>`; and `targets`.

    Raises:
        EngineError: `invalid_batch`; it names the batch's `role`, if it is not the batch analyzed.
    """
    try:
        return _read_batch(path)
    except engine.EngineError as error:
        if not role:
            raise
        message = f"in the batch given as {role}: {error.message}"
        raise engine.EngineError(error.code, message, param=role, remedy=error.remedy) from error


def _read_batch(path: Path) -> tuple[Any, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: in the file they lie at any address, and the last bits of a sum may depend on its alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise engine.EngineError(
            "invalid_batch",
            f"the batch is no safetensors file: {str(error).splitlines()[0]}",
            param="batch",
            remedy=f"store it with safetensors, tensors named {INPUTS} and {TARGETS}",
        ) from error
    if TARGETS not in tensors:
        raise _incomplete(f"it has no tensor named {TARGETS}", list(tensors))
    targets = tensors.pop(TARGETS)
    if list(tensors) == [INPUTS]:
        return tensors[INPUTS], targets
    named = {name.removeprefix(f"{INPUTS}."): t for name, t in tensors.items() if name.startswith(f"{INPUTS}.")}
    if not named or len(named) != len(tensors):
        raise _incomplete(f"inputs are named {INPUTS}, or {INPUTS}.0, {INPUTS}.1, …, or {INPUTS}.<name>", list(tensors))
    if all(name.isdigit() for name in named):
        places = sorted(named, key=int)
        if [int(p) for p in places] != list(range(len(places))):
            raise _incomplete("positional inputs must be numbered 0, 1, … without gaps", list(tensors))
        return tuple(named[place] for place in places), targets
    return named, targets


def _incomplete(reason: str, names: list[str]) -> engine.EngineError:
    return engine.EngineError(
        "invalid_batch", f"the batch cannot be used: {reason}", param="batch", remedy=f"it holds: {', '.join(names)}"
    )


def _check_device(name: str) -> torch.device:
    """The device, reached.

    Raises:
        EngineError: `unavailable`.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise _no_device(f"device {name} does not exist: torch {torch.__version__} sees {count} CUDA devices")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise _no_device(f"device {name} does not work: {str(error).splitlines()[0]}") from error
    return device


def _no_device(message: str) -> engine.EngineError:
    return engine.EngineError(
        "unavailable", message, remedy="start the worker with --device cpu, or with a device that is there"
    )


def _warm_up(device: torch.device) -> None:
    """Let the first job not pay for lazy imports, threads and the device's context."""
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    engine.analyze(net, torch.randn(2, 2), torch.tensor([0, 1]), ["diag_ggn_mc"], device=device)
