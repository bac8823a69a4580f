"""A verdict on a whole batch from its first few samples.

The probe holds the gradients of all samples at all taps, twice over. Where the operators themselves prove which rows
are which samples (`sample_axes`), it only says so again, and a few samples say it as well. So these go through the
program and are judged by themselves, and what was found holds for the whole batch if that

- is *proved* to keep its samples apart, by its own operators: nothing is concluded from few samples about many;
- took the same way: the same decisions, and a graph that is the few samples' node for node, with the taps in the same
  places, so that the closed forms which added up are the ones in use;
- and the few samples settle the matter: each reached every tap whose rows count, and no sum that was compared is zero.

Otherwise the whole batch is judged, with whatever that has to say.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature_engine.division import narrowed
from curvature_engine.errors import EngineError, lacks_memory
from curvature_engine.execution import tensors_in
from curvature_engine.judgement import judge, proved_attribution, proved_strides
from curvature_engine.parameters import Parameter
from curvature_engine.precision import all_finite
from curvature_engine.probe import TapVerdict, Verdict
from curvature_engine.products import exactly
from curvature_engine.program import Forward, Inputs
from curvature_engine.sample_strides import axis_of
from curvature_engine.tape import Tap
from curvature_engine.watched import Derivation

FEW = 3
"""Two samples hardly differ from a pair: turned over and rolled by one they are the same."""
LEAST = 2 * FEW
"""The smallest batch whose few samples are worth a pass of their own."""
MOST_ROUNDS = 2**14
"""Of all loops in their pass together: one that ends for the whole batch need not end for them."""


@dataclass(frozen=True)
class _Found:
    """What the few samples showed.

    Attributes:
        way: all that has to be the same for the whole batch.
        shapes: of the taps' first outputs.
    """

    verdict: Verdict
    way: Hashable
    shapes: tuple[tuple[int, ...], ...]


class FewSamples:
    """The first few samples of one batch, judged when somebody asks, and once.

    Args:
        run: a forward pass with a graph, as the whole batch's.
        select: what the loss is taken of.
    """

    def __init__(
        self,
        run: Callable[[Inputs], Forward],
        select: Callable[[Any], Tensor],
        inputs: Inputs,
        parameters: Mapping[str, Parameter],
    ) -> None:
        self._run, self._select, self._inputs, self._parameters = run, select, inputs, parameters
        self._asked = False
        self._found: _Found | None = None

    def ask(self) -> None:
        """Judge them, unless that was done: best before the whole batch's graph is there."""
        if not self._asked:
            self._asked = True
            try:
                self._found = self._judged()
            except (EngineError, RuntimeError, MemoryError) as error:
                # What is wrong with the model, or with memory, the whole batch will tell.
                if not isinstance(error, EngineError) and not lacks_memory(error):
                    raise

    def verdict_for(self, forward: Forward, outputs: Tensor) -> Verdict | None:
        """The verdict on a pass of the whole batch, or of a part of it; None where that has to be judged itself."""
        if forward.routed_by_data or not forward.samples.keeps_rows(outputs) or not all_finite(outputs.detach()):
            return None
        self.ask()
        found, taps, N = self._found, forward.tape.taps, forward.samples.N
        if found is None or _way(forward, outputs, self._parameters) != found.way:
            return None
        verdicts: list[TapVerdict] = []
        for tap, few, shape in zip(taps, found.verdict.taps, found.shapes, strict=True):
            if not _is_of(tap, N, shape):
                return None
            attribution = None if few.attribution is None else proved_attribution(tap, N)
            if (attribution is None) != (few.attribution is None):
                return None
            if attribution is not None and few.attribution is not None and attribution.order != few.attribution.order:
                return None
            verdicts.append(TapVerdict(attribution, few.pure, few.reached))
        return Verdict(tuple(verdicts), strides=tuple(tap.stride for tap in taps), probed=FEW)

    def _judged(self) -> _Found | None:
        forward = self._run(narrowed(self._inputs, [0] * len(tensors_in(self._inputs)), 0, FEW))
        outputs, tape = self._select(forward.outputs), forward.tape
        if forward.routed_by_data or not outputs.requires_grad or not forward.samples.keeps_rows(outputs):
            return None
        with exactly(outputs.device):
            verdict = judge(outputs, tape, self._parameters)
        if proved_strides(verdict, outputs, tape, forward.samples) is None:
            return None
        if verdict.mismatched or verdict.silent or not (verdict.finite and verdict.confirmable):
            return None
        if not all(_is_settled(tap, found) for tap, found in zip(tape.taps, verdict.taps, strict=True)):
            return None
        shapes = tuple(tap.shapes[0] for tap in tape.taps)
        return _Found(verdict, _way(forward, outputs, self._parameters), shapes)


def can_be_few(inputs: Inputs) -> bool:
    """Whether a batch has enough samples for few of them to be worth it, all along the first axis."""
    found = tensors_in(inputs)
    if not found or any(t.dim() == 0 for t in found):
        return False
    N = found[0].shape[0]
    return N >= LEAST and all(t.shape[0] == N for t in found)


def _is_settled(tap: Tap, found: TapVerdict) -> bool:
    """Whether nothing about a tap is left to more samples."""
    if found.attribution is None:
        return tap.rule is None or not found.reached or tap.static
    return found.attribution.determined and found.complete


def _is_of(tap: Tap, N: int, few: tuple[int, ...]) -> bool:
    """Whether a tap's output has the shape that the few samples' had, but for the number of samples."""
    shape = tap.shapes[0]
    if shape == few or tap.stride is None:
        return shape == few
    axis = axis_of(shape, tap.stride, N)
    if axis is None or len(few) != len(shape) or few[axis.number] * N != shape[axis.number] * FEW:
        return False
    return all(a == b for place, (a, b) in enumerate(zip(shape, few, strict=True)) if place != axis.number)


def _way(forward: Forward, outputs: Tensor, parameters: Mapping[str, Parameter]) -> Hashable:
    """How a pass went, whatever number of samples took it."""
    tape = forward.tape
    leaves = {id(t): place for place, t in enumerate(t for p in parameters.values() for t in p.tensors)}
    return (
        forward.decisions,
        forward.used_dropout,
        (outputs.dtype, outputs.shape[1:]),
        frozenset(tape.superseded),
        tuple(_outline(tap) for tap in tape.taps),
        _graph(outputs, [edge for tap in tape.taps for edge in tap.edges], leaves),
    )


def _outline(tap: Tap) -> Hashable:
    rule = tap.rule
    return (
        (tap.name, tap.place, tap.static, tap.provisional, tap.intact, tap.stride, len(tap.shapes)),
        tuple((t.dtype, t.dim()) for t in tap.saved),
        None if rule is None else (type(rule), rule.row_axes, rule.channel_axis, rule.bias_scale, rule.inputs_first),
        tuple((use.role, use.watched.parameter, _index(use.watched.index), use.watched.origins) for use in tap.uses),
    )


def _index(index: Tensor | Derivation | None) -> Hashable:
    if isinstance(index, Derivation):
        return "derived", index.dtype, len(index.shape)  # what the initial state makes may have a row per sample
    return None if index is None else tuple(index.shape)


def _graph(outputs: Tensor, edges: Sequence[GradientEdge], leaves: Mapping[int, int]) -> Hashable:
    """What leads back from the outputs: per node its kind, its leaf's number and where it leads, and the edges' places.

    Nodes are numbered as they are met, so that graphs of one kind have one description; it holds none of them.
    """
    start = get_gradient_edge(outputs)
    numbers: dict[Node, int] = {start.node: 0}
    order: list[Node] = [start.node]
    lines: list[Hashable] = []
    for node in order:  # which grows meanwhile
        further: list[tuple[int, int] | None] = []
        for source, place in node.next_functions:
            if source is None:
                further.append(None)
                continue
            if source not in numbers:
                numbers[source] = len(order)
                order.append(source)
            further.append((numbers[source], place))
        lines.append((node.name(), leaves.get(id(getattr(node, "variable", None))), tuple(further)))
    return tuple(lines), start.output_nr, tuple((numbers.get(edge.node), edge.output_nr) for edge in edges)
