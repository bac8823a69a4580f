"""How an exported program nests its inputs and outputs, read from the text that torch keeps of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvature_engine.errors import EngineError

_SEQUENCES = {"builtins.tuple": tuple, "builtins.list": list, "collections.deque": list}


@dataclass(frozen=True)
class Tree:
    """A leaf (`kind` None), a sequence, or a mapping with `keys`."""

    kind: str | None
    keys: tuple[Any, ...] | None
    children: tuple["Tree", ...]

    @property
    def leaves(self) -> int:
        """How many leaves it has."""
        return 1 if self.kind is None else sum(child.leaves for child in self.children)

    def flatten(self, value: Any, name: str) -> list[Any]:
        """The leaves of a value of this form.

        Raises:
            EngineError: `invalid_inputs` where it has another form.
        """
        if self.kind is None:
            return [value]
        return [
            leaf
            for child, (part, inner) in zip(self.children, self._parts(value, name), strict=True)
            for leaf in child.flatten(inner, part)
        ]

    def _parts(self, value: Any, name: str) -> list[tuple[str, Any]]:
        if self.keys is not None:
            if isinstance(value, Mapping) and set(value) == set(self.keys):
                return [(f"{name}[{key!r}]", value[key]) for key in self.keys]
            raise _misshapen(name, f"a dictionary with {', '.join(map(repr, self.keys)) or 'no keys'}", value)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(self.children):
            return [(f"{name}[{i}]", inner) for i, inner in enumerate(value)]
        raise _misshapen(name, f"{len(self.children)} values in a row", value)

    def build(self, leaves: Iterator[Any]) -> Any:
        """A value of this form from its leaves; classes of other libraries become dictionaries or tuples."""
        if self.kind is None:
            return next(leaves)
        parts = [child.build(leaves) for child in self.children]
        if self.keys is not None:
            return dict(zip(self.keys, parts, strict=True))
        return _SEQUENCES.get(self.kind, tuple)(parts)


def read_tree(text: str) -> Tree:
    """The form that torch's `treespec_dumps` describes (version 1)."""
    version, tree = json.loads(text)
    if version != 1:
        raise ValueError(f"version {version} of the description of inputs and outputs")
    return _read(tree)


def _read(tree: Mapping[str, Any]) -> Tree:
    kind, children = tree["type"], tuple(_read(child) for child in tree["children_spec"])
    if kind is None:
        return Tree(None, None, ())
    context = tree["context"]
    keys = json.loads(context) if isinstance(context, str) and kind not in _SEQUENCES else context
    named = isinstance(keys, list) and len(keys) == len(children) and all(isinstance(k, str | int) for k in keys)
    return Tree(str(kind), tuple(keys) if named and kind not in _SEQUENCES else None, children)


def _misshapen(name: str, expected: str, value: Any) -> EngineError:
    return EngineError(
        "invalid_inputs",
        f"input {name} must be {expected}; got {type(value).__name__}"
        + (f" of {len(value)}" if isinstance(value, Sequence | Mapping) else ""),
        param=f"inputs.{name}",
        remedy="nest the inputs as they were nested when the model was exported",
    )
