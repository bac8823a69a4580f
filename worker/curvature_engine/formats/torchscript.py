"""TorchScript: files of `torch.jit.save`, ScriptModules, and modules that can be scripted."""

import io
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from curvature_engine.canonical import describe_graph
from curvature_engine.digests import Digest
from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Run
from curvature_engine.formats.base import Formal, FrontEnd, Inputs, Use, bind_inputs, without_parameters
from curvature_engine.formats.consumers import find_consumers
from curvature_engine.parameters import group_by_storage
from curvature_engine.torchscript import compile_graph


class TorchScript(FrontEnd):
    """A ScriptModule, compiled; it becomes this program's own."""

    format = "torchscript"
    save_with = "torch.jit.save(torch.jit.script(model), path)"

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device, *, eval: bool) -> None:
        self.was_training = bool(getattr(module, "training", False)) or any(
            bool(getattr(m, "training", False)) for m in module.modules()
        )
        if eval:
            module.eval()
        self._module = module
        self.parameters, self.aliases = group_by_storage(module.named_parameters(remove_duplicate=False))
        if not self.parameters:
            raise without_parameters()
        self.buffers = tuple(name for name, _ in module.named_buffers())
        try:
            self._graph = module.inlined_graph
        except RuntimeError as error:
            raise EngineError(
                "unsupported_model",
                f"the module has no forward that can be read: {first_line(error)}",
                param="model",
                remedy="script or trace the module with torch.jit and save it with torch.jit.save",
            ) from error
        self._compiled = compile_graph(self._graph, device)
        self.edits_tensors = self._compiled.edits_tensors
        self.asks_layout = self._compiled.asks_layout
        arguments = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        self._formal = [Formal(a.name, not a.has_default_value(), a.default_value) for a in arguments]

    @classmethod
    def holds(cls, entries: Collection[str]) -> bool:
        return any(entry.partition("/")[2] == "constants.pkl" for entry in entries)

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, nn.Module)

    @classmethod
    def from_file(cls, path: Path, device: torch.device, *, eval: bool) -> Self:
        try:
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                "invalid_model",
                f"{path.name} cannot be read as TorchScript: {first_line(error)}",
                param="model",
                remedy=f"save the model with {cls.save_with}",
            ) from error
        return cls(module, device, eval=eval)

    @classmethod
    def from_object(cls, model: Any, device: torch.device, *, eval: bool) -> Self:
        if isinstance(model, torch.jit.ScriptModule):
            return cls(_copy(model, device), device, eval=eval)
        try:
            scripted = torch.jit.script(model)
        except Exception as error:
            raise EngineError(
                "unsupported_model",
                f"{type(model).__name__} cannot be scripted: {first_line(error)}",
                param="model",
                remedy="trace it with torch.jit.trace and pass the result",
            ) from error
        return cls(_copy(scripted, device), device, eval=eval)

    def bind(self, inputs: Inputs) -> list[Any]:
        return bind_inputs(inputs, self._formal)

    def run(self, run: Run, arguments: Sequence[Any]) -> Any:
        return self._compiled.run(run, [self._module._c, *arguments])

    def describe(self, digest: Digest) -> None:
        digest.add(self.format, self.was_training)
        digest.add([(formal.name, formal.required) for formal in self._formal])
        digest.add([formal.default for formal in self._formal])
        digest.add(dict(self._module.named_buffers()))
        describe_graph(digest, self._graph, self._module._c)

    def operators(self) -> Counter[str]:
        return Counter(self._compiled.calls)

    def refused(self) -> list[Use]:
        return [Use(*each) for each in self._compiled.refused]

    def consumers(self) -> dict[str, list[Use]]:
        return find_consumers(self._graph, self._module._c, self.parameters)


def _copy(module: torch.jit.ScriptModule, device: torch.device) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    try:
        torch.jit.save(module, buffer)
    except RuntimeError as error:
        raise EngineError(
            "unsupported_model",
            f"the module cannot be saved: {first_line(error)}",
            param="model",
            remedy="write functions with a gradient of their own (torch.autograd.Function) in terms of operators",
        ) from error
    buffer.seek(0)
    loaded: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device)  # type: ignore[no-untyped-call]
    return loaded
