"""A loaded model: its parameters by identity, and its forward as a compiled program."""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Decision, Run
from curvature_engine.probe import Verdicts
from curvature_engine.tape import Tape
from curvature_engine.torchscript import compile_graph

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass
class Parameter:
    """One parameter: its tensors (more than one where a file unties what shares storage) and its names."""

    name: str
    tensors: list[Tensor]
    aliases: list[str] = field(default_factory=list)

    @property
    def tensor(self) -> Tensor:
        """The tensor under the parameter's first name."""
        return self.tensors[0]

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient."""
        return any(t.requires_grad for t in self.tensors)


@dataclass
class Forward:
    """What one forward pass left behind."""

    outputs: Any
    tape: Tape
    decisions: tuple[Decision, ...]
    routed_by_data: bool
    used_dropout: bool


class Program:
    """A model ready to be run and differentiated.

    Attributes:
        parameters: name → parameter, as in `named_parameters()`; shared ones once.
        aliases: a shared parameter's further names → its first.
        buffers: names of the tensors that are none.
        was_training: whether the file was saved in training mode.
        verdicts: what the probe found, per shapes and path.
    """

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device, *, eval: bool) -> None:
        self.device = device
        self.was_training = bool(getattr(module, "training", False)) or any(
            bool(getattr(m, "training", False)) for m in module.modules()
        )
        self.keeps_training = self.was_training and not eval
        if eval:
            module.eval()
        self._module = module
        self.parameters, self.aliases = _collect_parameters(module)
        self.buffers = tuple(name for name, _ in module.named_buffers())
        self._parameter_places = frozenset(
            t.untyped_storage().data_ptr() for p in self.parameters.values() for t in p.tensors if t.numel()
        )
        try:
            self._compiled = compile_graph(module.inlined_graph, device)
        except RuntimeError as error:
            raise EngineError(
                "unsupported_model",
                f"the module has no forward that can be read: {first_line(error)}",
                param="model",
                remedy="script or trace the module with torch.jit and save it with torch.jit.save",
            ) from error
        self._schema = module.forward.schema  # type: ignore[attr-defined]
        self.verdicts = Verdicts()

    def run(self, inputs: Inputs, tape: Tape) -> Forward:
        """Run forward once on `inputs`, recording on `tape`.

        Raises:
            EngineError: if the program cannot be run on them.
        """
        arguments = [self._module._c, *self._bind(inputs)]
        run = Run(
            self.device,
            tape,
            edits=self._compiled.edits_tensors or self.keeps_training,
            parameter_places=self._parameter_places,
            allow_dropout=self.keeps_training,
        )
        try:
            with torch.enable_grad():
                outputs = self._compiled.run(run, arguments)
        finally:
            run.close()
        return Forward(outputs, tape, tuple(run.decisions), run.routed_by_data, run.used_dropout)

    def _bind(self, inputs: Inputs) -> list[Any]:
        """Line the batch's inputs up with forward's parameters."""
        formal = self._schema.arguments[1:]
        names = [argument.name for argument in formal]
        if isinstance(inputs, Mapping):
            unknown = [name for name in inputs if name not in names]
            if unknown:
                raise EngineError(
                    "invalid_inputs",
                    f"forward has no input named {unknown[0]!r}",
                    param=f"inputs.{unknown[0]}",
                    remedy=f"its inputs are: {', '.join(names)}",
                )
            given = dict(inputs)
        else:
            values = inputs if isinstance(inputs, tuple | list) else (inputs,)
            if len(values) > len(formal):
                raise EngineError(
                    "invalid_inputs",
                    f"forward takes {len(formal)} inputs ({', '.join(names)}); got {len(values)}",
                    param="inputs",
                    remedy="give as many inputs as forward takes",
                )
            given = dict(zip(names, values, strict=False))
        bound = []
        for argument in formal:
            if argument.name in given:
                bound.append(given[argument.name])
            elif argument.has_default_value():
                bound.append(argument.default_value)
            else:
                raise EngineError(
                    "invalid_inputs",
                    f"forward's input {argument.name!r} is missing ({len(given)} given, it takes {len(formal)}: "
                    f"{', '.join(names)})",
                    param=f"inputs.{argument.name}",
                    remedy="give it too, by place or by name",
                )
        return bound


def load(model: Any, *, device: str | torch.device = "cpu", eval: bool = True) -> Program:
    """Load a TorchScript file, or take a ScriptModule or nn.Module.

    The caller's module stays as it is: the program works on a copy.

    Args:
        model: path, ScriptModule, or nn.Module (which is scripted).
        device: where to compute.
        eval: put the model into eval mode.

    Raises:
        EngineError: `invalid_model`, `no_parameters`, `unsupported_model`.
    """
    if isinstance(model, Program):
        return model
    device = _device(device)
    if isinstance(model, str | os.PathLike):
        return Program(_load_file(Path(model), device), device, eval=eval)
    if isinstance(model, torch.jit.ScriptModule):
        return Program(_copy(model, device), device, eval=eval)
    if isinstance(model, nn.Module):
        try:
            scripted = torch.jit.script(model)
        except Exception as error:
            raise EngineError(
                "unsupported_model",
                f"{type(model).__name__} cannot be scripted: {first_line(error)}",
                param="model",
                remedy="trace it with torch.jit.trace and pass the result",
            ) from error
        return Program(_copy(scripted, device), device, eval=eval)
    raise EngineError(
        "invalid_model",
        f"a model is a path, a ScriptModule or an nn.Module; got {type(model).__name__}",
        param="model",
        remedy="script or trace it with torch.jit",
    )


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise EngineError(
            "invalid_option",
            f"device {device!r} is not available: {first_line(error)}",
            param="device",
            remedy='pass "cpu", or a device that is there',
        ) from error
    if found.type == "meta":
        raise EngineError(
            "invalid_option", "the meta device holds no numbers", param="device", remedy='pass "cpu" or "cuda"'
        )
    return found


def _copy(module: torch.jit.ScriptModule, device: torch.device) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    loaded: torch.jit.ScriptModule = torch.jit.load(buffer, map_location=device)  # type: ignore[no-untyped-call]
    return loaded


def _load_file(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    remedy = "save the model with torch.jit.save(torch.jit.script(model), path)"
    if not path.is_file():
        raise EngineError("invalid_model", f"there is no file {path.name}", param="model", remedy="check the path")
    if not zipfile.is_zipfile(path):
        raise EngineError(
            "invalid_model",
            f"{path.name} is no TorchScript file: not a complete zip archive ({path.stat().st_size} bytes)",
            param="model",
            remedy=remedy,
        )
    try:
        loaded: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            "invalid_model",
            f"{path.name} cannot be read as TorchScript: {first_line(error)}",
            param="model",
            remedy=remedy,
        ) from error
    return loaded


def _collect_parameters(module: torch.jit.ScriptModule) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Parameters by storage identity: what shares memory is one parameter under several names."""
    found: dict[str, Parameter] = {}
    aliases: dict[str, str] = {}
    by_place: dict[tuple[Any, ...], Parameter] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = by_place.get(place) if tensor.numel() else None
        if known is None:
            by_place[place] = found[name] = Parameter(name, [tensor])
            continue
        known.aliases.append(name)
        aliases[name] = known.name
        if all(tensor is not t for t in known.tensors):
            known.tensors.append(tensor)
    if not found:
        raise EngineError(
            "no_parameters",
            "the model has no parameters: a frozen or optimised file keeps them as constants",
            param="model",
            remedy="save the module before torch.jit.freeze or optimize_for_inference",
        )
    return found, aliases
