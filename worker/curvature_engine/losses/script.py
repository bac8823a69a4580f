"""A loss function written in TorchScript, run by the same interpreter as models: only allowed operators are called."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Run
from curvature_engine.losses.base import unsupported_loss
from curvature_engine.torchscript import Compiled, compile_graph

_REMEDY = "save a function of (outputs, targets) with torch.jit.script(function).save(path)"


class LossScript:
    """A function of (outputs, targets) that returns each sample's loss, [N].

    Args:
        source: a scripted function or module, the bytes of its file, or the file's path.

    Raises:
        EngineError: `unsupported_loss`.
    """

    def __init__(self, source: Any) -> None:
        self._data = _read(source)
        arguments = self._load(torch.device("cpu")).forward.schema.arguments[1:]  # type: ignore[attr-defined]
        required = [a.name for a in arguments if not a.has_default_value()]
        if len(arguments) < 2 or len(required) > 2:
            raise unsupported_loss(
                f"a loss takes (outputs, targets); this one takes ({', '.join(a.name for a in arguments)})", _REMEDY
            )
        self._defaults = [a.default_value for a in arguments[2:]]
        self._compiled: dict[torch.device, tuple[Any, Compiled]] = {}

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each sample's loss, [N], on the recorded graph.

        Raises:
            EngineError: `unsupported_operator`, `unsupported_loss`.
        """
        module, compiled = self._on(outputs.device)
        run = Run(
            outputs.device,
            None,
            edits=compiled.edits_tensors,
            parameter_places=frozenset(),
            allow_dropout=False,
        )
        try:
            with torch.enable_grad():
                result = compiled.run(run, [module._c, outputs, targets, *self._defaults])
        except EngineError as error:
            code = error.code if error.code in ("unsupported_operator", "out_of_memory") else "unsupported_loss"
            message = f"in the loss function: {error.message.replace('the model', 'it')}"
            raise EngineError(
                code, message, param="loss", remedy="check it on outputs and targets like these"
            ) from error
        finally:
            run.close()
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.shape != outputs.shape[:1]:
            came = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise unsupported_loss(
                f"a loss function returns one floating-point number per sample, [{outputs.shape[0]}]; got {came}",
                "sum over all axes but the first; the reduction is the request's",
            )
        return result

    def _on(self, device: torch.device) -> tuple[Any, Compiled]:
        if device not in self._compiled:
            module = self._load(device).eval()
            self._compiled[device] = module, compile_graph(module.inlined_graph, device)
        return self._compiled[device]

    def _load(self, device: torch.device) -> torch.jit.ScriptModule:
        try:
            buffer = io.BytesIO(self._data)
            module: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device)  # type: ignore[no-untyped-call]
            module.inlined_graph  # noqa: B018 (raises where there is no forward)
        except (RuntimeError, ValueError) as error:
            raise unsupported_loss(f"the loss cannot be read as TorchScript: {first_line(error)}", _REMEDY) from error
        return module


def _read(source: Any) -> bytes:
    if isinstance(source, torch.jit.ScriptFunction | torch.jit.ScriptModule):
        buffer = io.BytesIO()
        torch.jit.save(source, buffer)
        return buffer.getvalue()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise unsupported_loss(f"there is no file {path.name}", "check the path of the loss function")
        source = path.read_bytes()
    if not isinstance(source, bytes) or not zipfile.is_zipfile(io.BytesIO(source)):
        raise unsupported_loss("the loss is no TorchScript file", _REMEDY)
    return source
