"""A TorchScript program told in a canonical way: its inlined graph without names, and the attributes that it reads.

Values count in the order in which they are made. Of class names, what TorchScript mangles is replaced by a count.
"""

import re
from typing import Any

from torch import Tensor

from curvature_engine.digests import Digest

_MANGLED = re.compile(r"[\w.]*__torch__[\w.]*")
_MANGLE = re.compile(r"___torch_mangle_\d+\.")


def describe_graph(digest: Digest, graph: Any, module: Any) -> None:
    """Tell a module's inlined graph, whose first input stands for the module's script object."""
    _Teller(digest, module).tell(graph)


class _Teller:
    def __init__(self, digest: Digest, module: Any) -> None:
        self._digest, self._module = digest, module
        self._numbers: dict[str, int] = {}
        self._objects: dict[str, Any] = {}
        """Values that are script objects known before any run."""
        self._classes: dict[str, dict[str, int]] = {}
        self._told: set[tuple[int, str]] = set()
        self._edited: set[str] = set()

    def tell(self, graph: Any) -> None:
        self._objects[next(iter(graph.inputs())).debugName()] = self._module
        self._block(graph)

    def _block(self, block: Any) -> None:
        self._digest.add("block", self._made(block.inputs()))
        for node in block.nodes():
            self._node(node)
        self._digest.add("end", self._read(block.outputs()))

    def _node(self, node: Any) -> None:
        self._digest.add("node", node.kind(), _schema(node), self._read(node.inputs()))
        for name in sorted(node.attributeNames()):
            self._digest.add(name, node.kindOf(name))
            self._attribute(node, name)
        if node.kind() == "prim::GetAttr":
            self._value_read(node)
        for block in node.blocks():
            self._block(block)
        self._digest.add(self._made(node.outputs()))

    def _attribute(self, node: Any, name: str) -> None:
        """One of a node's own attributes: a constant, a name, a type."""
        kind = node.kindOf(name)
        if kind in _PLAIN:
            self._digest.add(getattr(node, kind)(name))
        elif kind == "ival":
            self._digest.add(node.ival(name))
        elif kind in ("ty", "tys"):
            found = getattr(node, kind)(name)
            self._digest.add([self._type(each) for each in (found if kind == "tys" else [found])])
        else:
            self._digest.add_unlike()

    def _value_read(self, node: Any) -> None:
        """What the attribute that a node reads holds before any run."""
        name = node.s("name")
        owner = self._objects.get(node.input().debugName())
        if owner is None or not hasattr(owner, "getattr"):
            self._digest.add_unlike()
            return
        value = owner.getattr(name)
        if hasattr(value, "getattr") and not isinstance(value, Tensor):
            self._objects[node.output().debugName()] = value
        elif (hash(owner), name) not in self._told:
            self._told.add((hash(owner), name))
            self._digest.add(value)

    def _made(self, values: Any) -> list[Any]:
        """The types of new values, which are counted."""
        found = []
        for value in values:
            self._numbers[value.debugName()] = len(self._numbers)
            found.append(self._type(value.type()))
        return found

    def _read(self, values: Any) -> list[int]:
        return [self._numbers[value.debugName()] for value in values]

    def _type(self, type_: Any) -> str:
        return _MANGLED.sub(lambda found: self._class(found.group()), f"{type_.kind()} {type_} {type_.annotation_str}")

    def _class(self, name: str) -> str:
        """A class's name, and how many of that name came before it."""
        plain = _MANGLE.sub("", name)
        known = self._classes.setdefault(plain, {})
        return f"{plain}#{known.setdefault(name, len(known))}"


_PLAIN = ("i", "f", "c", "s", "t", "is", "fs", "ss", "ts")
"""Kinds of attributes that are numbers, texts, tensors, and lists of them."""


def _schema(node: Any) -> str:
    return str(node.schema()) if node.kind().startswith("aten::") else ""
