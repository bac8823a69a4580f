"""The graph of an exported program, read from its JSON description.

Source: `torch/_export/serde/schema.py` of torch 2.13 (schema 8.20). Its unions are objects with one key, the kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from curvature_engine.errors import EngineError

MAJOR_VERSION = 8
"""Raised by torch with every change that older readers would misread."""


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by name."""

    name: str


@dataclass(frozen=True)
class Unreadable:
    """An argument of a kind that no supported operator takes."""

    kind: str


@dataclass(frozen=True)
class Node:
    """One call.

    Attributes:
        target: qualified name, e.g. `torch.ops.aten.linear.default`, `_operator.add`.
        named: arguments by the schema's names (empty for calls without schema).
        values: all arguments, in order.
        outputs: `Ref`s, lists of them, or None, one per result.
        place: where in the model's code it came from.
    """

    target: str
    named: Mapping[str, Any]
    values: tuple[Any, ...]
    outputs: tuple[Any, ...]
    place: str


@dataclass(frozen=True)
class Graph:
    """Nodes in order, between inputs and outputs (`Ref`s or constants)."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    nodes: tuple[Node, ...]
    sizes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Tensor → its sizes: a number, or the text of an expression."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def check_version(program: Mapping[str, Any]) -> None:
    """Refuse descriptions that would be misread.

    Raises:
        EngineError: `invalid_model`.
    """
    version = program["schema_version"]
    if version["major"] != MAJOR_VERSION:
        raise EngineError(
            "invalid_model",
            f"the exported program has schema version {version['major']}.{version['minor']} "
            f"(torch {program.get('torch_version', 'unknown')}); version {MAJOR_VERSION} is read",
            param="model",
            remedy=f"export and save it with the worker's torch, {torch.__version__}",
        )


def read_graph(graph: Mapping[str, Any]) -> Graph:
    """A graph or a higher-order operator's subgraph."""
    metas = graph["tensor_values"]
    return Graph(
        tuple(read_argument(a) for a in graph["inputs"]),
        tuple(read_argument(a) for a in graph["outputs"]),
        tuple(_read_node(node) for node in graph["nodes"]),
        {name: tuple(read_size(s) for s in meta["sizes"]) for name, meta in metas.items()},
        {name: dtype for name, meta in metas.items() if (dtype := DTYPES.get(meta["dtype"])) is not None},
    )


def _read_node(node: Mapping[str, Any]) -> Node:
    inputs = [(each["name"], read_argument(each["arg"])) for each in node["inputs"]]
    return Node(
        node["target"],
        {name: value for name, value in inputs if name},
        tuple(value for _, value in inputs),
        tuple(read_argument(a) for a in node["outputs"]),
        _place(node),
    )


def read_argument(argument: Mapping[str, Any]) -> Any:
    """A union's value: a constant, a `Ref`, a `Graph`, a list of them, or `Unreadable`."""
    ((kind, value),) = argument.items()
    reader = _READERS.get(kind)
    return Unreadable(kind) if reader is None else reader(value)


def read_size(size: Mapping[str, Any]) -> int | str:
    """A size: a number, or the text of an expression in symbols."""
    return int(size["as_int"]) if "as_int" in size else str(size["as_expr"]["expr_str"])


def _ref(value: Mapping[str, Any]) -> Ref:
    return Ref(value["name"])


def _symbolic(value: Mapping[str, Any]) -> Any:
    ((kind, held),) = value.items()
    return Ref(held) if kind == "as_name" else held


def _optional(value: Mapping[str, Any]) -> Any:
    return _ref(value["as_tensor"]) if "as_tensor" in value else None


def _list_of(reader: Callable[[Any], Any]) -> Callable[[Sequence[Any]], list[Any]]:
    return lambda values: [reader(value) for value in values]


def _device(value: Mapping[str, Any]) -> torch.device:
    return torch.device(value["type"])


DTYPES: dict[int, torch.dtype] = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16,
}  # fmt: skip
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}

_READERS: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda value: None,
    "as_tensor": _ref,
    "as_tensors": _list_of(_ref),
    "as_nested_tensors": _list_of(_list_of(_ref)),
    "as_optional_tensor": _optional,
    "as_optional_tensors": _list_of(_optional),
    "as_int": int,
    "as_ints": _list_of(int),
    "as_int_lists": _list_of(_list_of(int)),
    "as_float": float,
    "as_floats": _list_of(float),
    "as_float_lists": _list_of(_list_of(float)),
    "as_bool": bool,
    "as_bools": _list_of(bool),
    "as_string": str,
    "as_strings": _list_of(str),
    "as_complex": lambda value: complex(float(value["real"]), float(value["imag"])),
    "as_sym_int": _symbolic,
    "as_sym_ints": _list_of(_symbolic),
    "as_sym_float": _symbolic,
    "as_sym_floats": _list_of(_symbolic),
    "as_sym_bool": _symbolic,
    "as_sym_bools": _list_of(_symbolic),
    "as_scalar_type": DTYPES.__getitem__,
    "as_layout": _LAYOUTS.__getitem__,
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
    "as_device": _device,
    "as_graph": lambda value: read_graph(value["graph"]),
}


def _place(node: Mapping[str, Any]) -> str:
    """The innermost line of the model's own code, or of torch's where there is no other: file, line, code."""
    lines = node["metadata"].get("stack_trace", "").splitlines()
    frames = [(line.strip(), lines[i + 1 : i + 2]) for i, line in enumerate(lines) if line.strip().startswith("File ")]
    if not frames:
        return f"node {node.get('name') or node['target']}"
    own = [frame for frame in frames if "/site-packages/torch/" not in frame[0]]
    where, code = (own or frames)[-1]
    file, _, rest = where.removeprefix("File ").replace('"', "").partition(", ")
    return ": ".join([f"{file.rsplit('/', 1)[-1]}, {rest}", *(line.strip() for line in code if line.strip())])
