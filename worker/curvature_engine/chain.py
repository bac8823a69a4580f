"""The chain of operators from a program's outputs back to its inputs.

The tape sees operators that consume parameters; KFRA needs every operator between them. So that nothing else pays for
it, links are recorded only where an extension asks for them. As on the tape, an operator's ends are *gradient edges*,
taken while it runs: an in-place operator right after changes the tensor, but not the edge. Between two edges ordinary
autograd gives the products with that one operator's Jacobian, on the graph that is there anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature_engine.calls import OperatorCall
from curvature_engine.errors import EngineError

EdgeKey = tuple[Node, int]


def edge_key(edge: GradientEdge) -> EdgeKey:
    """What identifies an edge: its node and which of the node's outputs."""
    return edge.node, edge.output_nr


@dataclass(frozen=True)
class Socket:
    """One end of a link: a tensor as it was then.

    Attributes:
        position: of the argument; 0 for results.
        shape: the tensor's.
        graph_shape: that of gradients at the edge (the same elements in the same order).
    """

    position: int
    edge: GradientEdge
    shape: torch.Size
    graph_shape: torch.Size
    dtype: torch.dtype

    @property
    def key(self) -> EdgeKey:
        """The edge's."""
        return edge_key(self.edge)


@dataclass(frozen=True)
class Entry:
    """How the batch entered a call.

    Attributes:
        inputs: the arguments on the way back, each edge once.
        tensors: how many tensors among its arguments depend on the batch, differentiable or not.
    """

    inputs: tuple[Socket, ...]
    tensors: int


@dataclass(frozen=True)
class Link:
    """One operator call that made a differentiable tensor from the batch.

    Attributes:
        number: in the order of the forward pass.
        versions: of its tensor arguments, right after the call.
    """

    number: int
    call: OperatorCall
    arguments: tuple[Any, ...]
    versions: tuple[int | None, ...]
    entry: Entry
    output: Socket

    @property
    def name(self) -> str:
        """The operator's name without the `_` of the in-place form."""
        return self.call.name.removesuffix("_")

    @property
    def title(self) -> str:
        """The operator and its place, for messages."""
        return f"aten::{self.call.name} ({self.call.place})"

    def intact(self, position: int) -> bool:
        """Whether an argument is still the tensor that the operator saw."""
        argument = self.arguments[position]
        return isinstance(argument, Tensor) and argument._version == self.versions[position]


class Links:
    """The links of one forward pass, found by the edge of what they made."""

    def __init__(self) -> None:
        self._makers: dict[EdgeKey, Link] = {}

    def enter(self, tensors: Sequence[Sequence[Tensor]]) -> Entry:
        """Take the ends of the arguments' tensors that depend on the batch, before the call, which may edit them."""
        found: dict[EdgeKey, Socket] = {}
        for position, held in enumerate(tensors):
            for tensor in held:
                if tensor.requires_grad:
                    socket = _socket(tensor, position)
                    found.setdefault(socket.key, socket)
        return Entry(tuple(found.values()), sum(len(held) for held in tensors))

    def leave(self, entry: Entry, call: OperatorCall, arguments: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Note what a call made.

        One that returned its argument (dropout in eval mode), or a view of the same elements in the same order, made
        nothing new.
        """
        known = {socket.key for socket in entry.inputs}
        versions = tuple(a._version if isinstance(a, Tensor) else None for a in arguments)
        for tensor in results:
            if not tensor.requires_grad:
                continue
            output = _socket(tensor, 0)
            if output.key not in known:
                link = Link(len(self._makers), call, tuple(arguments), versions, entry, output)
                self._makers.setdefault(output.key, link)

    def has_maker(self, key: EdgeKey) -> bool:
        """Whether a call on record made the tensor at an edge."""
        return key in self._makers

    def maker(self, key: EdgeKey) -> Link:
        """The call that made the tensor at an edge.

        Raises:
            EngineError: `unsupported_model` where none is on record.
        """
        link = self._makers.get(key)
        if link is None:
            raise unsupported_chain(f"the way back meets {key[0].name()}, which no operator on record made")
        return link


def reached_edges(outputs: Tensor) -> set[EdgeKey]:
    """All edges at which gradients of the outputs may arrive."""
    edge = get_gradient_edge(outputs)
    waiting: list[EdgeKey] = [(edge.node, edge.output_nr)]
    found, entered = set(waiting), set[Node]()
    while waiting:
        node, _ = waiting.pop()
        if node in entered:
            continue
        entered.add(node)
        further = [(source, number) for source, number in node.next_functions if source is not None]
        found.update(further)
        waiting += further
    return found


def anchor(output: Tensor) -> Tensor:
    """The tensor at whose gradient edge the whole gradient of an output arrives.

    Some operators return a view of a tensor of their own (linear on sequences: of a matrix product). An in-place
    operator right after takes the view's node out of the graph, so take the edge of that inner tensor, which has the
    same elements in the same order.
    """
    inner = output._base if output._is_view() else None
    if inner is None or inner.grad_fn is None or inner.numel() != output.numel():
        return output
    return inner if inner.is_contiguous() and output.is_contiguous() else output


def unsupported_chain(reason: str) -> EngineError:
    """KFRA's recursion is not defined for this model."""
    return EngineError(
        "unsupported_model",
        f"kfra goes back along a chain of layers: {reason}",
        param="kfra",
        remedy="take kflr, which needs no chain, or name the parameters behind that operator in parameters=",
    )


def _socket(tensor: Tensor, position: int) -> Socket:
    inner = anchor(tensor)
    return Socket(position, get_gradient_edge(inner), tensor.shape, inner.shape, tensor.dtype)
