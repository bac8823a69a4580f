"""A model as given, and the file that carries it.

A path goes as it is, an ExportedProgram or ScriptModule is saved, and an nn.Module is copied, put into eval mode, and
exported, or else scripted, or else traced with the batch's inputs. The user's module is never changed.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvature_client._batches import Batch
from curvature_client._errors import ModelConversionError, refusal
from curvature_client._exporting import check_outputs, export, quiet, save_export
from curvature_client._payloads import IN_MEMORY_BYTES, Payload, existing_file

FORMATS = ("auto", "export", "script", "trace")
"""How an nn.Module may be turned into a file; "auto" takes the first of the others that works."""

EVAL_COPY = "the model was in training mode; an eval-mode copy was analyzed (eval=True)"
TRACED_TRAINING = "the model was traced in training mode (eval=False): layers like dropout are fixed in the trace"


@dataclass(frozen=True)
class Converted:
    """A model's file.

    Attributes:
        notes: what the user should know about how it came to be.
        way: "export", "script" or "trace"; None where the model went as it was given.
    """

    payload: Payload
    notes: list[str]
    way: str | None = None


def convert(model: Any, batch: Batch, folder: Path, *, eval: bool, format: str = "auto") -> tuple[Payload, list[str]]:
    """The model's file for one batch, and what the user should know about it; otherwise as `convert_for`."""
    found = convert_for(model, [batch], folder, eval=eval, format=format)
    return found.payload, found.notes


def convert_for(model: Any, batches: Sequence[Batch], folder: Path, *, eval: bool, format: str = "auto") -> Converted:
    """The model's file.

    Args:
        model: a path, an ExportedProgram, a ScriptModule, or an nn.Module.
        batches: the first gives the inputs to export or trace with; what comes of it is held against the module on all.
        folder: holds the file while it is sent.
        eval: whether a module in training mode is put into eval mode.
        format: "auto", or one of "export", "script", "trace" for an nn.Module.

    Raises:
        ModelConversionError: no way that was allowed worked; the message has every way's reason.
        UnprocessableError: the model is something else, or the path leads nowhere.
    """
    if format not in FORMATS:
        raise _invalid_format(f"format is one of {', '.join(FORMATS)}; got {format!r}")
    if isinstance(model, str | os.PathLike):
        _check_unconverted(format, "a file")
        return Converted(Payload.of_file(existing_file(Path(model), "model")), [])
    try:
        import torch
    except ModuleNotFoundError:
        torch = None  # type: ignore[assignment]
    if torch is not None and isinstance(model, torch.export.ExportedProgram):
        _check_unconverted(format, "an exported program")
        return Converted(_keep(save_export(model, folder)), [])
    if torch is None or not isinstance(model, torch.nn.Module):
        raise refusal(
            "invalid_model",
            f"a model is a path, an ExportedProgram, a ScriptModule or an nn.Module; got {_describe(model)}",
            param="model",
            remedy="without torch, pass the path of a model file" if torch is None else "pass the module itself",
        )
    if isinstance(model, torch.jit.ScriptModule):
        # Its mode is in the file; the worker puts it into eval mode and says so.
        _check_unconverted(format, "a ScriptModule")
        return Converted(_save(model, folder), [])
    return _from_module(model, batches, folder, eval, format)


def _check_unconverted(format: str, what: str) -> None:
    if format != "auto":
        raise _invalid_format(f"format={format!r} says how to convert an nn.Module; {what} goes as it is")


def _invalid_format(message: str) -> Exception:
    return refusal("invalid_option", message, param="format", remedy="leave format out, or pass the nn.Module itself")


def _from_module(module: Any, batches: Sequence[Batch], folder: Path, eval: bool, format: str) -> Converted:
    module, notes = _unwrap(module)
    try:
        duplicate = copy.deepcopy(module).cpu()
    except Exception as error:
        raise ModelConversionError(
            f"{type(module).__name__} could not be copied ({_first_line(error)})",
            code="model_conversion",
            param="model",
            remedy="pass a ScriptModule, or the path of a saved one",
        ) from error
    training = any(part.training for part in duplicate.modules())
    if eval and training:
        duplicate.eval()
        notes.append(EVAL_COPY)
    failures: dict[str, Exception] = {}
    for way in FORMATS[1:] if format == "auto" else (format,):
        try:
            payload, more = _WAYS[way](duplicate, batches, folder)
        except Exception as error:  # noqa: BLE001 (the compilers' errors have many types)
            failures[way] = error
            continue
        if way == "trace":
            reasons = "".join(f"; it could not be {_PARTICIPLES[w]} ({_first_line(e)})" for w, e in failures.items())
            notes.append(f"the model was traced (torch.jit.trace): what its code decides is fixed as decided{reasons}")
            if training and not eval:
                notes.append(TRACED_TRAINING)
        return Converted(payload, notes + more, way)
    reasons = " nor ".join(f"{_PARTICIPLES[way]} ({_first_line(error)})" for way, error in failures.items())
    neither = "neither " if len(failures) > 1 else "not "
    raise ModelConversionError(
        f"{type(module).__name__} could be {neither}{reasons}".replace("be not", "not be"),
        code="model_conversion",
        param="model",
        remedy="pass a model file of your own, or check that the model accepts the batch's inputs"
        if len(batches) == 1
        else "pass a model file of your own, or give parts of one shape and size (DataLoader's drop_last=True)",
    ) from next(reversed(failures.values()))


def _unwrap(module: Any) -> tuple[Any, list[str]]:
    """The module inside what torch.compile and the data-parallel wrappers made of it."""
    import torch

    notes = []
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while hasattr(module, "_orig_mod") or isinstance(module, parallel):
        notes.append(f"the module inside {type(module).__name__} was analyzed; parameters are named as there")
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module, notes


def _refuse_parametrizations(module: Any) -> None:
    """Scripting them gives a module that raises when it is called."""
    from torch.nn.utils.parametrize import is_parametrized

    for name, part in module.named_modules():
        if is_parametrized(part):
            raise RuntimeError(f"{name or 'it'} has parametrizations, which torch.jit.script does not support")


def _export(module: Any, batches: Sequence[Batch], folder: Path) -> tuple[Payload, list[str]]:
    inputs, *further = (batch.example_inputs() for batch in batches)
    return _keep(export(module, inputs, folder, further)), []


def _script(module: Any, batches: Sequence[Batch], folder: Path) -> tuple[Payload, list[str]]:
    import torch

    _refuse_parametrizations(module)
    with quiet():
        scripted = torch.jit.script(module)
    return _save(scripted, folder), []


def _trace(module: Any, batches: Sequence[Batch], folder: Path) -> tuple[Payload, list[str]]:
    import torch

    inputs, *further = (batch.example_inputs() for batch in batches)
    arguments = {"example_kwarg_inputs": inputs} if isinstance(inputs, dict) else {"example_inputs": inputs}
    with quiet() as caught, torch.random.fork_rng(devices=[]):
        traced = torch.jit.trace(module, check_trace=False, **arguments)  # type: ignore[no-untyped-call]
    kind = torch.jit.TracerWarning  # type: ignore[attr-defined]
    for each in further:
        check_outputs(module, traced, each, "trace")
    tracer_warnings = {_first_line(w.message) for w in caught if issubclass(w.category, kind)}
    return _save(traced, folder), [f"tracing warned: {text}" for text in sorted(tracer_warnings)]


_WAYS = {"export": _export, "script": _script, "trace": _trace}
_PARTICIPLES = {"export": "exported", "script": "scripted", "trace": "traced"}


def _save(scripted: Any, folder: Path) -> Payload:
    # The file's own name stands inside it: always the same one, so that equal models have equal hashes.
    path = folder / "model.pt"
    try:
        with quiet():
            scripted.save(str(path))
    except RuntimeError as error:
        raise ModelConversionError(
            f"the ScriptModule could not be saved ({_first_line(error)})",
            code="model_conversion",
            param="model",
            remedy="save it yourself with torch.jit.save to see why",
        ) from error
    return _keep(path)


def _keep(path: Path) -> Payload:
    """The file, in memory where it is small."""
    if path.stat().st_size > IN_MEMORY_BYTES:
        return Payload.of_file(path)
    return Payload.of_bytes(path.read_bytes())


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(":")[:300]


def _describe(model: Any) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__} (make an instance)"
    if isinstance(model, Callable):  # type: ignore[arg-type]
        return f"the function {getattr(model, '__name__', model)!r}"
    return type(model).__name__
