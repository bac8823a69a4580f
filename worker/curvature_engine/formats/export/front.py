"""The front end of exported programs."""

import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor, nn

from curvature_engine.digests import Digest
from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Run
from curvature_engine.formats.base import Formal, FrontEnd, Inputs, Use, bind_inputs, without_parameters
from curvature_engine.formats.export.archive import PROGRAM, Archive
from curvature_engine.formats.export.compiler import Compiled
from curvature_engine.formats.export.consumers import find_consumers
from curvature_engine.formats.export.schema import Ref, check_version, read_argument, read_graph
from curvature_engine.formats.export.shapes import InputShapes
from curvature_engine.formats.export.trees import read_tree
from curvature_engine.parameters import group_by_storage


class Export(FrontEnd):
    """An exported program and its tensors, compiled."""

    format = "export"
    save_with = "torch.export.save(torch.export.export(model, …), path)"

    def __init__(
        self,
        program: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        check_version(program)
        module = program["graph_module"]
        self._graph = read_graph(module["graph"])
        self._signature = _Signature(module["signature"])
        held = {name: weights.get(key, constants.get(key)) for name, key in self._signature.held.items()}
        if absent := [self._signature.held[name] for name, tensor in held.items() if tensor is None]:
            raise ValueError(f"it has no tensor {absent[0]}")
        self._names = {name: key for name, key in self._signature.held.items() if name in self._signature.parameters}
        of_graph = set(self._names.values())
        named = [key for key, tensor in weights.items() if key in of_graph or isinstance(tensor, nn.Parameter)]
        self._told = (_essential(program), weights, constants)
        self.parameters, self.aliases = group_by_storage((key, weights[key]) for key in named)
        if not self.parameters:
            raise without_parameters()
        self.buffers = tuple(key for key in weights if key not in named)
        decomposed = "TRAINING" not in program.get("verifiers", ())
        self._compiled = Compiled(
            self._graph,
            {name: tensor for name, tensor in held.items() if tensor is not None},
            [name for name, _ in self._signature.inputs],
            self._signature.outputs,
            frozenset(self._names),
            device,
            decomposed=decomposed,
        )
        self.notes = (_DECOMPOSED,) if decomposed else ()
        self.edits_tensors, self.was_training = self._compiled.edits_tensors, self._compiled.trains
        self._read_calls(module["module_call_graph"][0]["signature"])
        self._shapes = self._input_shapes(program)
        self.fixed_samples = self._shapes.fixed_samples
        self.asks_layout = self._shapes.asks_layout

    @classmethod
    def holds(cls, entries: Collection[str]) -> bool:
        return any(entry.partition("/")[2] == PROGRAM for entry in entries)

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return isinstance(model, torch.export.ExportedProgram)

    @classmethod
    def from_file(cls, path: Path, device: torch.device, *, eval: bool) -> Self:
        return cls._read(str(path), path.name, device)

    @classmethod
    def from_object(cls, model: Any, device: torch.device, *, eval: bool) -> Self:
        buffer = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.save(model, buffer)
        except Exception as error:
            raise EngineError(
                "unsupported_model",
                f"the exported program cannot be saved: {first_line(error)}",
                param="model",
                remedy="check that torch.export.save works on it, or script the model",
            ) from error
        return cls._read(buffer, "the exported program", device)

    @classmethod
    def _read(cls, file: str | IO[bytes], name: str, device: torch.device) -> Self:
        try:
            with Archive(file) as archive:
                weights, constants = archive.tensors("weights", device), archive.tensors("constants", device)
                return cls(archive.program(), weights, constants, device)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _unreadable(name, error) from error
        except (zipfile.BadZipFile, SyntaxError, RecursionError) as error:
            raise _unreadable(name, error) from error

    def bind(self, inputs: Inputs) -> list[Any]:
        values = bind_inputs(inputs, self._formal)
        roots = {each.name: value for each, value in zip(self._formal, values, strict=True)}
        leaves = [
            leaf
            for each, tree, value in zip(self._formal, self._trees, values, strict=True)
            for leaf in (self._constants_of(each) if value is _AS_EXPORTED else tree.flatten(value, each.name))
        ]
        tensors, given = [], []
        for (name, spec), value in zip(self._signature.leaves, leaves, strict=True):
            if name is None:
                _check_constant(spec, value)
                continue
            given.append(value)
            if isinstance(spec, Ref) and name in self._graph.sizes:
                tensors.append(value)
        self._shapes.check(tensors, roots)
        return given

    def run(self, run: Run, arguments: Sequence[Any]) -> Any:
        return self._out_tree.build(iter(self._compiled.run(run, arguments)))

    def describe(self, digest: Digest) -> None:
        digest.add(self.format, *self._told)

    def operators(self) -> Counter[str]:
        return Counter(self._compiled.calls)

    def consumers(self) -> dict[str, list[Use]]:
        first = {key: self.aliases.get(key, key) for key in self._names.values()}
        held = {name: first[key] for name, key in self._names.items()}
        return find_consumers(self._graph, held, [name for name, _ in self._signature.inputs], self.parameters)

    def refused(self) -> list[Use]:
        return [Use(*each) for each in self._compiled.refused]

    # Inputs and outputs

    def _read_calls(self, signature: Mapping[str, Any]) -> None:
        """How inputs are named and nested, and outputs nested."""
        in_tree, self._out_tree = read_tree(signature["in_spec"]), read_tree(signature["out_spec"])
        positional, keyword = in_tree.children
        self._trees = [*positional.children, *keyword.children]
        keys = [str(key) for key in keyword.keys or ()]
        names = signature.get("forward_arg_names") or []
        if len(names) != len(self._trees):  # forward(*args)
            names = [*(f"arg{i}" for i in range(len(positional.children))), *keys]
        if in_tree.leaves != len(self._signature.leaves) or self._out_tree.leaves != len(self._signature.outputs):
            raise ValueError("its inputs or outputs are not those of its signature")
        self._first_leaf, count = {}, 0
        self._formal = []
        for name, tree in zip(names, self._trees, strict=True):
            constant = all(leaf is None for leaf, _ in self._signature.leaves[count : count + tree.leaves])
            self._formal.append(Formal(name, required=not constant, default=_AS_EXPORTED if constant else None))
            self._first_leaf[name] = (count, tree.leaves)
            count += tree.leaves

    def _constants_of(self, formal: Formal) -> list[Any]:
        start, count = self._first_leaf[formal.name]
        return [value for _, value in self._signature.leaves[start : start + count]]

    def _input_shapes(self, program: Mapping[str, Any]) -> InputShapes:
        graph = self._graph
        inputs = [
            (name, graph.sizes[name], graph.dtypes[name]) for name, _ in self._signature.inputs if name in graph.sizes
        ]
        ranges = {
            symbol: (bounds.get("min_val"), bounds.get("max_val"))
            for symbol, bounds in program["range_constraints"].items()
        }
        return InputShapes(inputs, ranges, program.get("guards_code") or [])


def _essential(described: Any) -> Any:
    """A program's description in canonical order, without what loading and saving again may change."""
    if isinstance(described, dict):
        return {key: _essential(described[key]) for key in sorted(described.keys() - _INCIDENTAL)}
    return [_essential(each) for each in described] if isinstance(described, list) else described


_INCIDENTAL = {"metadata", "torch_version", "storage_offset", "strides"}
"""Where nodes came from, who wrote the file, and how the exporter's own intermediate tensors lay in memory."""

_DECOMPOSED = (
    "the exported program was decomposed (run_decompositions), which drops torch.no_grad blocks: if the model has "
    "some, analyze the program as torch.export.export returns it"
)
_AS_EXPORTED: Any = object()
"""In place of an input that the program has as a constant and the user left out."""


class _Signature:
    """What the graph's inputs and outputs are.

    Attributes:
        held: graph input → the tensor it holds, by that tensor's name.
        parameters: graph inputs that hold parameters.
        leaves: the user's inputs, flat: (graph input, `Ref`), or (None, constant) where the program fixed one.
        inputs: those of them that the graph takes.
        outputs: the user's outputs, flat.
    """

    def __init__(self, signature: Mapping[str, Any]) -> None:
        self.held: dict[str, str] = {}
        self.parameters: set[str] = set()
        self.leaves: list[tuple[str | None, Any]] = []
        for spec in signature["input_specs"]:
            ((kind, value),) = spec.items()
            self._input(kind, value)
        self.inputs = [(name, value) for name, value in self.leaves if name is not None]
        outputs = [spec["user_output"]["arg"] for spec in signature["output_specs"] if "user_output" in spec]
        self.outputs = [read_argument(argument) for argument in outputs]

    def _input(self, kind: str, value: Mapping[str, Any]) -> None:
        if kind in _HELD:
            name = value["arg"]["name"]
            self.held[name] = value[_HELD[kind]]
            if kind == "parameter":
                self.parameters.add(name)
        elif kind == "constant_input":
            ((_, constant),) = value["value"].items()
            self.leaves.append((None, None if "as_none" in value["value"] else constant))
        elif kind == "user_input" and isinstance(found := read_argument(value["arg"]), Ref):
            self.leaves.append((found.name, found))
        elif kind == "user_input":
            self.leaves.append((None, found))
        else:
            raise EngineError(
                "unsupported_model",
                f"the exported program takes an input of kind {kind}, which is not supported",
                param="model",
                remedy="keep custom objects and tokens out of the model",
            )


_HELD = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}


def _check_constant(expected: Any, value: Any) -> None:
    if isinstance(value, Tensor) or type(value) is not type(expected) or value != expected:
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise EngineError(
            "invalid_inputs",
            f"the program was exported for an input that is {expected!r} always; got {shown}",
            param="inputs",
            remedy="leave it out, or export the model anew with such an input",
        )


def _unreadable(name: str, error: Exception) -> EngineError:
    reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    return EngineError(
        "invalid_model",
        f"{name} cannot be read as an exported program: {reason}",
        param="model",
        remedy=f"save the model with {Export.save_with}, of torch {torch.__version__.partition('+')[0]}",
    )
