"""Which operators of a TorchScript graph consume which parameters, found without running it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvature_engine.formats.base import Use
from curvature_engine.operators import MOVERS
from curvature_engine.parameters import Parameter
from curvature_engine.places import place_of
from curvature_engine.tensor_methods import TENSOR_QUESTIONS

_CARRIERS = frozenset(
    {
        *("prim::ListConstruct", "prim::TupleConstruct", "prim::DictConstruct", "prim::ListUnpack"),
        *("prim::TupleUnpack", "prim::TupleIndex", "prim::TupleSlice", "aten::__getitem__", "aten::append"),
        *("aten::list", "aten::values", "prim::unchecked_cast", "prim::unchecked_unwrap_optional"),
        *("aten::_unwrap_optional", "aten::dropout"),
    }
)
"""Nodes whose outputs hold what their inputs held."""

_EDITS_OF_CONTAINERS = ("aten::append", "aten::_set_item", "aten::extend", "aten::insert")


def find_consumers(graph: Any, module: Any, parameters: Mapping[str, Parameter]) -> dict[str, list[Use]]:
    """Parameter → its uses, in the graph's order; every branch counts, and a loop's body once.

    Args:
        graph: a module's inlined graph.
        module: the script object that the graph's first input stands for.
        parameters: those whose consumers are wanted.
    """
    return _Search(module, parameters).of(graph)


class _Search:
    def __init__(self, module: Any, parameters: Mapping[str, Parameter]) -> None:
        self._names = {id(t): name for name, p in parameters.items() for t in p.tensors}
        self._module = module
        self._objects: dict[str, Any] = {}
        """What a value stands for, where that is known before the run."""
        self._held: dict[str, frozenset[str]] = {}
        """The parameters that a value is, gathers from, or holds."""
        self._batch: set[str] = set()
        """Values that something of the batch entered, through tensors."""
        self._uses: dict[str, list[Use]] = {name: [] for name in parameters}

    def of(self, graph: Any) -> dict[str, list[Use]]:
        own, *inputs = graph.inputs()
        self._objects[own.debugName()] = self._module
        self._batch.update(value.debugName() for value in inputs)
        self._block(graph)
        return self._uses

    def _block(self, block: Any) -> None:
        for node in block.nodes():
            self._node(node)

    def _node(self, node: Any) -> None:
        kind: str = node.kind()
        if kind == "prim::GetAttr":
            self._attribute(node)
        elif kind == "prim::If":
            self._if(node)
        elif kind == "prim::Loop":
            self._loop(node)
        else:
            self._operator(node, kind)

    def _attribute(self, node: Any) -> None:
        owner = self._objects.get(node.input().debugName())
        if owner is None or not hasattr(owner, "getattr"):
            return
        value = owner.getattr(node.s("name"))
        self._objects[node.output().debugName()] = value
        self._hold(node.output(), self._parameters_in(value))

    def _parameters_in(self, value: Any) -> frozenset[str]:
        if isinstance(value, Tensor):
            return frozenset({self._names[id(value)]} if id(value) in self._names else ())
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return frozenset(name for each in value for name in self._parameters_in(each))
        return frozenset()

    def _if(self, node: Any) -> None:
        for block in node.blocks():
            self._block(block)
            for out, inner in zip(node.outputs(), block.outputs(), strict=True):
                self._pass_on(inner, out)

    def _loop(self, node: Any) -> None:
        (block,) = node.blocks()
        carried = list(block.inputs())[1:]
        for into, value in zip(carried, list(node.inputs())[2:], strict=True):
            self._pass_on(value, into)
        outputs = list(block.outputs())[1:]
        before = -1
        while before < len(self._batch):  # what a round carries into the next may be of the batch
            before, uses = len(self._batch), {name: list(found) for name, found in self._uses.items()}
            self._block(block)
            for into, value in zip(carried, outputs, strict=True):
                self._pass_on(value, into)
            if before < len(self._batch):
                self._uses = uses
        for into, out in zip(carried, node.outputs(), strict=True):
            self._pass_on(into, out)

    def _operator(self, node: Any, kind: str) -> None:
        inputs = list(node.inputs())
        name = kind.removeprefix("aten::")
        held = frozenset(parameter for value in inputs for parameter in self._of(value))
        makes_tensors = any(_may_hold_tensors(out.type()) for out in node.outputs())
        if not makes_tensors or name in TENSOR_QUESTIONS:
            return
        if any(value.debugName() in self._batch for value in inputs):
            edited = inputs[:1] if kind in _EDITS_OF_CONTAINERS else []
            self._batch.update(value.debugName() for value in [*node.outputs(), *edited])
        if not held or name == "detach":
            return
        if kind in _CARRIERS or (name in MOVERS and self._of(inputs[0]) == held):
            for out in node.outputs():
                self._hold(out, held)
            return
        alone = not any(value.debugName() in self._batch for value in inputs)
        for parameter in sorted(held):
            self._uses[parameter].append(Use(name, place_of(node), alone))

    def _pass_on(self, source: Any, target: Any) -> None:
        self._hold(target, self._of(source))
        if source.debugName() in self._batch:
            self._batch.add(target.debugName())

    def _hold(self, value: Any, parameters: frozenset[str]) -> None:
        self._held[value.debugName()] = self._of(value) | parameters

    def _of(self, value: Any) -> frozenset[str]:
        return self._held.get(value.debugName(), frozenset())


def _may_hold_tensors(type_: Any) -> bool:
    if type_.isSubtypeOf(torch._C.TensorType.get()):
        return True
    return type_.kind() in ("ListType", "OptionalType", "TupleType", "DictType", "AnyType", "UnionType")
