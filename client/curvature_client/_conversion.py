"""A model as given, and the TorchScript file that carries it.

A path goes as it is, a ScriptModule is saved, and an nn.Module is copied, put into eval mode, and scripted, or else
traced with the batch's inputs. The user's module is never changed.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curvature_client._batches import Batch
from curvature_client._errors import ModelConversionError, refusal
from curvature_client._payloads import IN_MEMORY_BYTES, Payload, existing_file

EVAL_COPY = "the model was in training mode; an eval-mode copy was analyzed (eval=True)"
TRACED_TRAINING = "the model was traced in training mode (eval=False): layers like dropout are fixed in the trace"


def convert(model: Any, batch: Batch, folder: Path, *, eval: bool) -> tuple[Payload, list[str]]:
    """The model's file, and what the user should know about how it came to be.

    Args:
        model: a path, a ScriptModule, or an nn.Module.
        batch: gives the inputs to trace with.
        folder: holds the file while it is sent.
        eval: whether a module in training mode is put into eval mode.

    Raises:
        ModelConversionError: neither scripting nor tracing worked; the message has both reasons.
        UnprocessableError: the model is something else, or the path leads nowhere.
    """
    if isinstance(model, str | os.PathLike):
        return Payload.of_file(existing_file(Path(model), "model")), []
    try:
        import torch
    except ModuleNotFoundError:
        torch = None  # type: ignore[assignment]
    if torch is None or not isinstance(model, torch.nn.Module):
        raise refusal(
            "invalid_model",
            f"a model is a path, a ScriptModule or an nn.Module; got {_describe(model)}",
            param="model",
            remedy="without torch, pass the path of a TorchScript file" if torch is None else "pass the module itself",
        )
    # A ScriptModule's mode is in the file; the worker puts it into eval mode and says so.
    scripted, notes = (model, []) if isinstance(model, torch.jit.ScriptModule) else _from_module(model, batch, eval)
    return _save(scripted, folder), notes


def _from_module(module: Any, batch: Batch, eval: bool) -> tuple[Any, list[str]]:
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
    try:
        _refuse_parametrizations(duplicate)
        return _script(duplicate), [*notes, "the model was scripted (torch.jit.script)"]
    except Exception as error:  # noqa: BLE001 (the compiler's errors have many types)
        script_error = error
    try:
        traced, tracer_notes = _trace(duplicate, batch.example_inputs())
    except Exception as trace_error:
        raise ModelConversionError(
            f"{type(module).__name__} could be neither scripted ({_first_line(script_error)}) "
            f"nor traced ({_first_line(trace_error)})",
            code="model_conversion",
            param="model",
            remedy="pass a ScriptModule of your own, or check that the model accepts the batch's inputs",
        ) from trace_error
    notes.append(f"the model was traced (torch.jit.trace), as it could not be scripted: {_first_line(script_error)}")
    if training and not eval:
        notes.append(TRACED_TRAINING)
    return traced, notes + tracer_notes


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


def _script(module: Any) -> Any:
    import torch

    with _quiet() as caught:
        scripted = torch.jit.script(module)
    del caught
    return scripted


def _trace(module: Any, inputs: tuple[Any, ...] | dict[str, Any]) -> tuple[Any, list[str]]:
    import torch

    arguments = {"example_kwarg_inputs": inputs} if isinstance(inputs, dict) else {"example_inputs": inputs}
    with _quiet() as caught, torch.random.fork_rng(devices=[]):
        traced = torch.jit.trace(module, check_trace=False, **arguments)  # type: ignore[no-untyped-call]
    kind = torch.jit.TracerWarning  # type: ignore[attr-defined]
    tracer_warnings = {_first_line(w.message) for w in caught if issubclass(w.category, kind)}
    return traced, [f"tracing warned: {text}" for text in sorted(tracer_warnings)]


def _save(scripted: Any, folder: Path) -> Payload:
    # The file's own name stands inside it: always the same one, so that equal models have equal hashes.
    path = folder / "model.pt"
    try:
        with _quiet():
            scripted.save(str(path))
    except RuntimeError as error:
        raise ModelConversionError(
            f"the ScriptModule could not be saved ({_first_line(error)})",
            code="model_conversion",
            param="model",
            remedy="save it yourself with torch.jit.save to see why",
        ) from error
    if path.stat().st_size > IN_MEMORY_BYTES:
        return Payload.of_file(path)
    return Payload.of_bytes(path.read_bytes())


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what torch.jit warns about, its own deprecation above all, from the user, and from `-W error`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(":")[:300]


def _describe(model: Any) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__} (make an instance)"
    if isinstance(model, Callable):  # type: ignore[arg-type]
        return f"the function {getattr(model, '__name__', model)!r}"
    return type(model).__name__
