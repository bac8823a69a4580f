"""The last layers of a program, through which columns go back without autograd.

Through a linear layer, many columns cost less together: its weight is read once for all of them, and of small batches
that is most of the work. So the chain of linear layers, elementwise functions and reshapings at a program's end, its
*head*, is walked here, by the nodes of the graph that autograd made of it, with all columns beside each other.

Through a convolution, columns of large batches cost as much one by one. Of small ones, what each call takes is much of
it, and so the chain goes on through layers of images, convolution by convolution, with as many columns at a time as
stay in a cache. From where it ends, autograd goes on with each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature_engine.stretch_steps import (
    CONVOLUTIONS,
    IMAGES,
    MAX_POOLING,
    PADDING,
    PRODUCTS,
    RELU,
    VECTORS,
    Back,
    input_numel,
    pooled_and_rectified,
    takes,
)
from curvature_engine.tape import Tape

_CACHED_BYTES = 2**23
"""Of the largest gradient on the way, for all columns that go together on a CPU; of images, for one."""
_RESIDENT_BYTES = 2**28
"""The same on an accelerator."""
_NEAR_BYTES = 2**22
"""Of images on a CPU, for all columns that go together."""
_SMALL_CALLS = {"cpu"}
"""Devices where chains through images have been measured to pay."""


@dataclass(frozen=True)
class Passed:
    """Several columns, on their way back.

    Attributes:
        columns: at the outputs, [k, *outputs].
        taps: number of a tap that was passed → the gradients of its output, [k, *output].
        end: where they are now; None where nothing that is needed lies behind it.
        behind: gradients there, [k, …].
    """

    columns: Tensor
    taps: Mapping[int, Tensor]
    end: GradientEdge | None
    behind: Tensor

    def some(self, first: int, stop: int) -> "Passed":
        """Of some of the columns."""
        taps = {number: g[first:stop] for number, g in self.taps.items()}
        return Passed(self.columns[first:stop], taps, self.end, self.behind[first:stop])


@dataclass(frozen=True)
class Stretch:
    """Steps back one after another.

    Attributes:
        steps: (node, way back), from the outputs on.
        taps: node → the number of the tap at its output.
        end: the edge behind the last step; None where no gradient goes on from there.
        together: how many columns are best sent together.
    """

    steps: tuple[tuple[Node, Back], ...]
    taps: Mapping[Node, int]
    end: GradientEdge | None
    together: int

    def back(self, passed: Passed) -> Iterator[Passed]:
        """Send columns on, as many at a time as are best sent together."""
        k = len(passed.columns)
        size = -(-k // -(-k // self.together))  # with shares alike
        for first in range(0, k, size):
            yield self._back(passed if size == k else passed.some(first, first + size))

    def _back(self, passed: Passed) -> Passed:
        taps, g = dict(passed.taps), passed.behind
        for number, (node, step) in enumerate(self.steps):
            if node in self.taps:
                taps[self.taps[node]] = g
            if self.end is not None or number < len(self.steps) - 1:
                g = step(node, g)
        return Passed(passed.columns, taps, self.end, g)


@dataclass(frozen=True)
class _Step:
    """One node on the way, with what lies behind it, and with how many numbers a column has there."""

    node: Node
    back: Back
    end: GradientEdge | None
    numel: int


def find_stretches(outputs: Tensor, tape: Tape, needed: Sequence[int]) -> list[Stretch]:
    """The head of a program with these outputs and what follows on it, as far as there are taps that are needed.

    It ends before the first node that is not known here, or that other tensors of the batch enter; and before images
    so large that what calls take is nothing beside them.
    """
    numbers = {tape.taps[i].edges[0].node: i for i in needed}
    if len(numbers) < len(needed):
        return []
    small_calls = outputs.device.type in _SMALL_CALLS
    try:
        steps = list(_walk(outputs, {**VECTORS, **IMAGES} if small_calls else VECTORS))
    except RuntimeError:
        return []  # something that was saved has been edited since
    last = max((place for place, step in enumerate(steps) if step.node in numbers), default=-1)
    found: list[Stretch] = []
    numel = outputs.numel()
    for group in _groups(steps[: last + 1]):
        taps = {step.node: numbers.pop(step.node) for step in group if step.node in numbers}
        end = group[-1].end if numbers else None
        passed = group if end is not None else group[:-1]
        column_bytes = max(numel, *(step.numel for step in passed), 1) * outputs.element_size()
        numel = group[-1].numel
        images = any(step.node.name() in IMAGES for step in group)
        if images and column_bytes > _CACHED_BYTES:
            break
        limit = _NEAR_BYTES if images else _CACHED_BYTES if small_calls else _RESIDENT_BYTES
        found.append(Stretch(tuple(_joined(group)), taps, end, max(1, limit // max(1, column_bytes))))
    while found and not found[-1].taps:
        found.pop()
    return found


def _groups(steps: Sequence[_Step]) -> Iterator[list[_Step]]:
    """The head; then up to a convolution each."""
    group: list[_Step] = []
    head = True
    for step in steps:
        name = step.node.name()
        if head and name in IMAGES:
            head = False
            if group:
                yield group
            group = []
        group.append(step)
        if name in CONVOLUTIONS:
            yield group
            group = []
    if group:
        yield group


def _joined(group: Sequence[_Step]) -> Iterator[tuple[Node, Back]]:
    """Steps and their nodes; those that are better taken together as one, under the first's."""
    place = 0
    while place < len(group):
        names = [step.node.name() for step in group[place : place + 3]]
        step = group[place]
        if names[:2] == [MAX_POOLING, RELU]:
            yield step.node, pooled_and_rectified(None, group[place + 1].node)
            place += 2
        elif names == [MAX_POOLING, PADDING, RELU]:
            yield step.node, pooled_and_rectified(group[place + 1].node, group[place + 2].node)
            place += 3
        else:
            yield step.node, step.back
            place += 1


def _walk(outputs: Tensor, ways: Mapping[str, Back]) -> Iterator[_Step]:
    """The steps back from the outputs on."""
    edge: GradientEdge | None = get_gradient_edge(outputs)
    numel = outputs.numel()
    while edge is not None and edge.output_nr == 0 and (found := _step(edge.node, ways)) is not None:
        place, back = found
        node = edge.node
        behind, number = node.next_functions[place]
        edge = None if behind is None or _is_leaf(behind) else GradientEdge(behind, number)
        if edge is not None:
            numel = input_numel(node, numel)
        yield _Step(node, back, edge, numel)


def _step(node: Any, ways: Mapping[str, Back]) -> tuple[int, Back] | None:
    """Which input of a node is the batch's, and the way back to it; None for others than those known."""
    name = node.name()
    if name not in ways or not takes(node):
        return None
    place = PRODUCTS.get(name, 0)
    others = (n for i, (n, _) in enumerate(node.next_functions) if i != place)
    return (place, ways[name]) if all(_is_parameter(n) for n in others) else None


def _is_parameter(node: Node | None) -> bool:
    """Whether a node stands for a leaf, maybe in another order."""
    if node is not None and node.name() in ("TBackward0", "CloneBackward0"):
        node = node.next_functions[0][0]
    return node is None or _is_leaf(node)


def _is_leaf(node: Node) -> bool:
    return node.name().endswith("AccumulateGrad")
