"""The confined process that opens models and runs the engine. It trusts nobody and is trusted by nobody."""

import logging
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import curvature_engine as engine
from curvature_protocol.names import INPUTS, TARGETS
from curvature_worker.channel import Channel, ChannelClosed

_PROGRAMS_KEPT = 8
_PROGRESS_SECONDS = 0.1


def serve(channel: Channel, isolation: str, options: dict[str, Any]) -> None:
    """Say ready, then answer orders until the channel closes."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.simplefilter("ignore")
    try:
        device = _check_device(options["device"])
        if options.get("threads"):
            torch.set_num_threads(int(options["threads"]))
    except engine.EngineError as error:
        channel.send({"event": "error", "code": error.code, "message": error.message, "remedy": error.remedy})
        return
    child = Child(channel, device, Path(options["inbox"]), Path(options["outbox"]))
    _warm_up()
    channel.send({"event": "ready", "isolation": isolation, "catalogue": engine.catalogue(), "device": str(device)})
    try:
        while (order := channel.receive()) is not None:
            child.answer(order)
    except ChannelClosed:
        return


class Child:
    """Runs orders one after another; keeps loaded programs."""

    def __init__(self, channel: Channel, device: torch.device, inbox: Path, outbox: Path) -> None:
        self._channel, self._device, self._inbox, self._outbox = channel, device, inbox, outbox
        self._programs: OrderedDict[tuple[str, bool], engine.Program] = OrderedDict()
        self._progress_at = 0.0

    def answer(self, order: dict[str, Any]) -> None:
        """Run one order and send its reply: `done` or `error`."""
        try:
            self._channel.send(self._run(order))
        except engine.EngineError as error:
            self._refuse(error.code, error.message, error.param, error.remedy)
        except (MemoryError, torch.OutOfMemoryError):
            self._refuse("out_of_memory", "memory ran out", None, "use a smaller batch or fewer extensions")
        except ChannelClosed:
            raise
        except Exception as error:  # noqa: BLE001 (the model's or the engine's failure must not end the child)
            traceback.print_exc()
            if "allocate memory" in str(error):
                self._refuse("out_of_memory", "memory ran out", None, "use a smaller batch or fewer extensions")
                return
            reason = str(error).splitlines()[0] if str(error) else ""
            self._refuse("internal_error", f"the engine failed: {type(error).__name__}: {reason}", None, None)

    def _refuse(self, code: str, message: str, param: str | None, remedy: str | None) -> None:
        self._channel.send({"event": "error", "code": code, "message": message, "param": param, "remedy": remedy})

    def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        request = order["request"]
        begun = time.perf_counter()
        program = self._load(order["model"], bool(request["eval"]))
        inputs, targets = read_batch(self._inbox / order["batch"])
        loaded = time.perf_counter()
        loss = request["loss"]
        analysis = engine.analyze(
            program,
            inputs,
            targets,
            [{"name": e["name"], "label": e["label"], "options": e["options"]} for e in request["extensions"]],
            loss=loss,
            reduction=request["reduction"],
            seed=request["seed"],
            parameters=request["parameters"],
            progress=self._report,
        )
        computed = time.perf_counter()
        groups = [self._store(group) for group in analysis.groups.values()]
        stored = time.perf_counter()
        value = float(analysis.loss)
        return {
            "event": "done",
            "loss": value if value - value == 0 else None,
            "groups": groups,
            "info": analysis.info,
            "warnings": analysis.warnings,
            "timings_ms": {
                "load": 1e3 * (loaded - begun),
                "compute": 1e3 * (computed - loaded),
                "write": 1e3 * (stored - computed),
            },
        }

    def _load(self, sha256: str, eval_mode: bool) -> engine.Program:
        key = (sha256, eval_mode)
        if key not in self._programs:
            self._programs[key] = engine.load(self._inbox / sha256, device=self._device, eval=eval_mode)
            while len(self._programs) > _PROGRAMS_KEPT:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_SECONDS:
            self._progress_at = now
            self._channel.send({"event": "progress", "done": done, "total": total})

    def _store(self, group: engine.Group) -> dict[str, Any]:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in group.tensors.items()}
        # Views of one storage would be refused by the format; each tensor owns its numbers.
        seen: set[int] = set()
        for key, tensor in tensors.items():
            if tensor.untyped_storage().data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensors[key] = tensor.clone()
            seen.add(tensors[key].untyped_storage().data_ptr())
        save_file(tensors, self._outbox / f"{group.label}.safetensors")
        return {
            "label": group.label,
            "extension": group.extension,
            "options": group.options,
            "kind": group.kind,
            "convention": group.convention,
            "missing": group.missing,
            "provenance": group.provenance,
        }


def read_batch(path: Path) -> tuple[Any, torch.Tensor]:
    """Inputs and targets of a batch file: `inputs`, or `inputs.0` …, or `inputs.<name>`; and `targets`.

    Raises:
        EngineError: `invalid_batch`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
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
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise engine.EngineError(
                "unavailable",
                f"device {name} does not exist: torch sees {count} CUDA devices",
                remedy="start the worker with --device cpu, or with a device that is there",
            )
        torch.zeros(1, device=device)
    return device


def _warm_up() -> None:
    """Let the first job not pay for lazy imports and threads."""
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    engine.analyze(net, torch.randn(2, 2), torch.tensor([0, 1]), ["diag_ggn_mc"])
