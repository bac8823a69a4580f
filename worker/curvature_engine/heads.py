"""The last layers of a program, through which many columns go back at once.

Back through a convolution, columns cost as much one by one as together. Through a linear layer they do not: its weight
is read once for all of them, and of small batches that is most of the work. So the chain of linear layers,
elementwise functions and reshapings at a program's end is walked here, by the nodes of the graph that autograd made
of it, with all columns beside each other; from where it ends, autograd goes on with each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature_engine.tape import Tape

aten = torch.ops.aten
_CACHED_BYTES = 2**23
"""Of the largest gradient on the way, for all columns that go together on a CPU."""
_RESIDENT_BYTES = 2**28
"""The same on an accelerator."""

Back = Callable[[Any, Tensor], Tensor]
"""(node, gradient of its output for k columns [k, *output]) → that of its input [k, *input]."""


def _product(node: Any, g: Tensor) -> Tensor:
    found: Tensor = g @ node._saved_mat2.t()
    alpha = getattr(node, "_saved_alpha", 1)
    return found if alpha == 1 else found * alpha


def _reshaped(node: Any, g: Tensor) -> Tensor:
    return g.reshape(len(g), *node._saved_self_sym_sizes)


_PRODUCTS = {"AddmmBackward0": 1, "MmBackward0": 0}
"""Nodes of products with a weight → which factor is the batch's."""
_OTHERS: dict[str, Back] = {
    "ReluBackward0": lambda node, g: aten.threshold_backward(g, node._saved_result, 0),
    "TanhBackward0": lambda node, g: aten.tanh_backward(g, node._saved_result),
    "SigmoidBackward0": lambda node, g: aten.sigmoid_backward(g, node._saved_result),
    "SiluBackward0": lambda node, g: aten.silu_backward(g, node._saved_self),
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "ReshapeAliasBackward0": _reshaped,
}
"""Nodes with one input → the way back to it, as autograd goes, for columns beside each other.

Not GELU: its kernel on CPUs does not repeat what was saved for all columns.
"""


@dataclass(frozen=True)
class Passed:
    """Several columns, sent back through a head.

    Attributes:
        taps: number of a tap in the head → the gradients of its output, [k, *output].
        behind: gradients where the head ends, [k, …]; None where nothing lies behind it.
    """

    taps: Mapping[int, Tensor]
    behind: Tensor | None


@dataclass(frozen=True)
class Head:
    """The end of a program.

    Attributes:
        steps: (node, way back), from the outputs on.
        taps: node → the number of the tap at its output.
        end: the edge behind the last step; None where no gradient goes on from there.
        column_bytes: of one column's largest gradient on the way.
    """

    steps: tuple[tuple[Node, Back], ...]
    taps: Mapping[Node, int]
    end: GradientEdge | None
    column_bytes: int

    def together(self, device: torch.device) -> int:
        """How many columns are best sent together."""
        limit = _CACHED_BYTES if device.type == "cpu" else _RESIDENT_BYTES
        return max(1, limit // max(1, self.column_bytes))

    def back(self, columns: Tensor) -> Passed:
        """Send columns [k, *outputs] back."""
        taps, g = {}, columns
        for number, (node, step) in enumerate(self.steps):
            if node in self.taps:
                taps[self.taps[node]] = g
            if self.end is None and number == len(self.steps) - 1:
                return Passed(taps, None)
            g = step(node, g)
        return Passed(taps, g)


def find_head(outputs: Tensor, tape: Tape, needed: Sequence[int]) -> Head | None:
    """The head of a program with these outputs; None where there is none, or no tap of those needed in it.

    It ends before the first node that is not known here, or that other tensors of the batch enter.
    """
    steps: list[tuple[Node, Back]] = []
    edge: GradientEdge | None = get_gradient_edge(outputs)
    numel = most = outputs.numel()
    try:
        while edge is not None and edge.output_nr == 0 and (found := _step(edge.node)) is not None:
            place, back = found
            steps.append((edge.node, back))
            behind, number = edge.node.next_functions[place]
            edge = None if behind is None or _is_leaf(behind) else GradientEdge(behind, number)
            if edge is not None:
                numel = _input_numel(steps[-1][0], numel)
                most = max(most, numel)
    except RuntimeError:
        return None  # something that was saved has been edited since
    known = {node for node, _ in steps}
    inside = [i for i in needed if tape.taps[i].edges[0].node in known]
    taps = {tape.taps[i].edges[0].node: i for i in inside}
    if not inside or len(taps) < len(inside):
        return None
    return Head(tuple(steps), taps, edge, most * outputs.element_size())


def _step(node: Any) -> tuple[int, Back] | None:
    """Which input of a node is the batch's, and the way back to it; None for others than those known."""
    name = node.name()
    if name in _PRODUCTS:
        place = _PRODUCTS[name]
        others = (n for i, (n, _) in enumerate(node.next_functions) if i != place)
        return (place, _product) if all(_is_parameter(n) for n in others) else None
    return (0, _OTHERS[name]) if name in _OTHERS else None


def _is_parameter(node: Node | None) -> bool:
    """Whether a node stands for a leaf, maybe transposed."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or _is_leaf(node)


def _is_leaf(node: Node) -> bool:
    return node.name().endswith("AccumulateGrad")


def _input_numel(node: Any, numel: int) -> int:
    """How many numbers a node's input has, of an output with `numel`."""
    if node.name() not in _PRODUCTS:
        return numel
    inner, outer = node._saved_mat2.shape
    return numel // int(outer) * int(inner)
