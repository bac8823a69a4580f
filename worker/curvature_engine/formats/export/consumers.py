"""Which operators of an exported graph consume which parameters, found without running it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from curvature_engine.formats.base import Use
from curvature_engine.formats.export.composites import recompose
from curvature_engine.formats.export.scalars import ASSERTIONS, QUESTIONS, READINGS
from curvature_engine.formats.export.schema import Graph, Node, Ref
from curvature_engine.operators import MOVERS

_ATEN = "torch.ops.aten."

_BATCH = ""
"""Stands for the batch among what values hold; no parameter has this name."""

Held = dict[str, frozenset[str]]
"""Value of a graph → the parameters that it is, gathers from, or holds, and `_BATCH` where the batch entered it."""


def find_consumers(
    graph: Graph, held: Mapping[str, str], batch: Iterable[str], parameters: Iterable[str]
) -> dict[str, list[Use]]:
    """Parameter → its uses in order; both branches of a condition count.

    Args:
        graph: the whole program.
        held: graph input → parameter.
        batch: graph inputs that are the batch's.
        parameters: whose uses are wanted.
    """
    uses: dict[str, list[Use]] = {name: [] for name in parameters}
    known = {name: frozenset({parameter}) for name, parameter in held.items()}
    _search(graph, known | dict.fromkeys(batch, frozenset({_BATCH})), uses)
    return uses


def _search(graph: Graph, held: Held, uses: dict[str, list[Use]]) -> list[frozenset[str]]:
    """What the graph's outputs hold."""
    for node in recompose(graph, frozenset(name for name, found in held.items() if found - {_BATCH})).nodes:
        _node(node, held, uses)
    return [_of(value, held) for value in graph.outputs]


def _node(node: Node, held: Held, uses: dict[str, list[Use]]) -> None:
    graphs = [value for value in node.values if isinstance(value, Graph)]
    if graphs:
        _subgraphs(node, graphs, held, uses)
        return
    name = node.target.removeprefix(_ATEN).partition(".")[0]
    found = frozenset(parameter for value in node.values for parameter in _of(value, held))
    if name in QUESTIONS or name in READINGS or name in ASSERTIONS:
        return
    batch, found = found & {_BATCH}, found - {_BATCH}
    _hold(node.outputs, batch, held)
    if not found or name == "detach":
        return
    if name in MOVERS and _of(node.values[0], held) - {_BATCH} == found:
        _hold(node.outputs, found, held)
        return
    for parameter in sorted(found):
        uses[parameter].append(Use(name, node.place, alone=not batch))


def _subgraphs(node: Node, graphs: Sequence[Graph], held: Held, uses: dict[str, list[Use]]) -> None:
    last = max(i for i, value in enumerate(node.values) if isinstance(value, Graph))
    given = [each for value in node.values[last + 1 :] for each in (value if isinstance(value, list) else [value])]
    for graph in graphs:
        inner = {f.name: _of(v, held) for f, v in zip(graph.inputs, given, strict=False) if isinstance(f, Ref)}
        results = _search(graph, {name: parameters for name, parameters in inner.items() if parameters}, uses)
        if any(results):
            _hold(node.outputs, frozenset().union(*results), held)


def _of(value: Any, held: Held) -> frozenset[str]:
    if isinstance(value, Ref):
        return held.get(value.name, frozenset())
    if isinstance(value, list):
        return frozenset(parameter for each in value for parameter in _of(each, held))
    return frozenset()


def _hold(outputs: Any, parameters: frozenset[str], held: Held) -> None:
    for output in outputs:
        if isinstance(output, list):
            _hold(output, parameters, held)
        elif isinstance(output, Ref):
            held[output.name] = held.get(output.name, frozenset()) | parameters
