"""An exported graph compiled to a list of steps over slots, as `torchscript.py` compiles TorchScript's.

The same `Run.call` executes every tensor operator, so that tape, guards, taint and openings are the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine import operators
from curvature_engine.calls import OperatorCall
from curvature_engine.contexts import ScriptContext
from curvature_engine.errors import EngineError
from curvature_engine.execution import Run, map_tensors
from curvature_engine.formats.export.composites import recompose
from curvature_engine.formats.export.scalars import ASSERTIONS, QUESTIONS, READINGS, SCALARS, unmet
from curvature_engine.formats.export.schema import Graph, Node, Ref, Unreadable
from curvature_engine.steps import Step, explained, refusing, unpacking
from curvature_engine.tensor_methods import NUMBER_OF

_ATEN = "torch.ops.aten."
_HIGHER_ORDER = "torch.ops.higher_order."

Scope = dict[str, int]
"""Names of one graph's values → slots."""


class Compiled:
    """A compiled graph: call `run` with the user's inputs.

    Args:
        graph: the whole program.
        held: the program's tensors (parameters, buffers, constants) by the names of the graph's inputs.
        inputs: the names of the graph's inputs that the user gives.
        outputs: the values that the user gets.
        parameters: names of the graph's inputs that hold parameters.
        device: where to compute; devices written in the program are replaced by it.
        decomposed: whether `run_decompositions` made the graph: then an alias may have been a detach.
    """

    def __init__(
        self,
        graph: Graph,
        held: Mapping[str, Tensor],
        inputs: Sequence[str],
        outputs: Sequence[Any],
        parameters: frozenset[str],
        device: torch.device,
        *,
        decomposed: bool,
    ) -> None:
        self._device, self._decomposed = device, decomposed
        self._count = 0
        self._touched: set[int] = set()
        self._constants: list[tuple[int, Any]] = []
        self.edits_tensors = False
        self.calls: Counter[str] = Counter()
        self.trains = False
        """Whether some layer that knows two modes was exported in training mode."""
        self.refused: list[tuple[str, str]] = []
        """(operator, place) of what no run could pass."""
        scope: Scope = {}
        for name, tensor in held.items():
            self._constants.append((self._named(scope, name), tensor))
        self._inputs = [self._named(scope, name) for name in inputs]
        self._steps: list[Step] = []
        touched = self._nodes(graph, scope, self._steps, parameters)
        self._outputs = [self._operand(value, scope, self._steps) for value in outputs]
        self._spent = self._find_spent(touched)

    def run(self, run: Run, arguments: Sequence[Any]) -> list[Any]:
        """Execute on the user's inputs, flat; returns the outputs, flat."""
        run.values = [None] * self._count
        run.tainted = [False] * self._count
        for slot, value in self._constants:
            run.values[slot] = map_tensors(run.private, value) if run.edits else value
        for slot, value in zip(self._inputs, arguments, strict=True):
            run.values[slot] = map_tensors(run.private, value) if run.edits else value
            run.tainted[slot] = True
        run.begin(run.values[slot] for slot in self._inputs)
        for place, step in enumerate(self._steps):
            step(run)
            run.release(self._spent.get(place, ()))
        return [run.values[slot] for slot in self._outputs]

    # Slots

    def _fresh(self) -> int:
        self._count += 1
        self._touched.add(self._count - 1)
        return self._count - 1

    def _find_spent(self, touched: Sequence[tuple[int, set[int]]]) -> dict[int, list[int]]:
        """Step → the slots that no later one reads. What is made before a run begins stays."""
        lasting = {*self._outputs, *self._inputs, *(slot for slot, _ in self._constants)}
        spent: dict[int, list[int]] = {}
        for place, slots in reversed(touched):
            spent.setdefault(place, []).extend(sorted(slots - lasting))
            lasting |= slots
        return spent

    def _named(self, scope: Scope, name: str) -> int:
        """A new slot for a name; a value is made once."""
        if name in scope:
            raise ValueError(f"the graph makes value {name!r} twice")
        scope[name] = self._fresh()
        return scope[name]

    def _operand(self, value: Any, scope: Scope, steps: list[Step]) -> int:
        """The slot of an argument; a list with values of the graph in it is put together by a step."""
        if isinstance(value, Ref):
            self._touched.add(scope[value.name])
            return scope[value.name]
        slot = self._fresh()
        if isinstance(value, list) and any(isinstance(each, Ref | list) for each in value):
            steps.append(_listing([self._operand(each, scope, steps) for each in value], slot))
        else:
            self._constants.append((slot, self._device if isinstance(value, torch.device) else value))
        return slot

    def _results(self, outputs: Sequence[Any], scope: Scope) -> list[int]:
        return [self._named(scope, output.name) if isinstance(output, Ref) else self._fresh() for output in outputs]

    # Nodes

    def _nodes(
        self, graph: Graph, scope: Scope, steps: list[Step], parameters: frozenset[str]
    ) -> list[tuple[int, set[int]]]:
        """Add the nodes' steps; returns, per node, the last of them and the slots that they touch."""
        touched = []
        for node in recompose(graph, parameters).nodes:
            around, self._touched = self._touched, set()
            made: list[Step] = []
            self._node(node, scope, made, parameters)
            steps.extend(explained(step, node.place) for step in made)
            touched.append((len(steps) - 1, self._touched))
            self._touched = around | self._touched
        return touched

    def _node(self, node: Node, scope: Scope, steps: list[Step], parameters: frozenset[str]) -> None:
        if node.target.startswith(_ATEN):
            self._aten(node, scope, steps)
        elif node.target in SCALARS:
            self._scalar(node, SCALARS[node.target], scope, steps)
        elif node.target.startswith(_HIGHER_ORDER) and node.target.removeprefix(_HIGHER_ORDER) in _BLOCKS:
            _BLOCKS[node.target.removeprefix(_HIGHER_ORDER)](self, node, scope, steps, parameters)
        else:
            self._refuse(node, scope, steps)

    def _refuse(self, node: Node, scope: Scope, steps: list[Step], kind: str = "") -> None:
        kind = kind or node.target.removeprefix("torch.ops.").replace(".", "::", 1)
        reason, remedy = operators.REFUSED.get(
            kind.removeprefix("aten::").partition(".")[0].removesuffix("_"), ("", "")
        )
        for output in node.outputs:
            self._results(output if isinstance(output, list) else [output], scope)
        self.refused.append((kind, node.place))
        steps.append(refusing(kind, node.place, reason, remedy))

    def _aten(self, node: Node, scope: Scope, steps: list[Step]) -> None:
        name, _, overload_name = node.target.removeprefix(_ATEN).partition(".")
        known = name in QUESTIONS or name in READINGS or name in ASSERTIONS
        allowed = operators.is_allowed(name) and name.removesuffix("_") not in operators.REFUSED
        packet = getattr(torch.ops.aten, name, None) if known or allowed else None
        if packet is None or overload_name not in packet.overloads():
            self._refuse(node, scope, steps, f"aten::{name}")
            return
        overload = getattr(packet, overload_name)
        arguments = _complete(overload, node.named)
        if any(isinstance(value, Unreadable | Graph) for value in arguments):
            self._refuse(node, scope, steps, f"aten::{name}")
        elif name in QUESTIONS:
            self._scalar(node, QUESTIONS[name], scope, steps, takes_tensors=True)
        elif name in READINGS:
            self._reading(node, READINGS[name], scope, steps)
        elif name in ASSERTIONS:
            self._assertion(node, name, arguments, scope, steps)
        else:
            self._call(node, overload, arguments, scope, steps)

    def _call(self, node: Node, overload: Any, arguments: list[Any], scope: Scope, steps: list[Step]) -> None:
        name, formal = node.target.removeprefix(_ATEN).partition(".")[0], overload._schema.arguments
        ins = [self._operand(value, scope, steps) for value in arguments]
        positional = sum(not argument.kwarg_only for argument in formal)
        keywords = tuple(argument.name for argument in formal[positional:])
        writes = tuple(i for i, a in enumerate(formal) if a.alias_info is not None and a.alias_info.is_write)
        self.edits_tensors = self.edits_tensors or bool(writes)
        self.calls[name] += 1
        self.trains = self.trains or _trains(name, dict(zip((a.name for a in formal), arguments, strict=True)))
        if self._decomposed and name == "alias":
            steps.append(_doubting(ins[0], node.place))
        listed = node.outputs[0] if len(node.outputs) == 1 and isinstance(node.outputs[0], list) else None
        outs = [self._fresh()] if listed is not None else self._results(node.outputs, scope)
        call = OperatorCall(name, overload, positional, keywords, writes, tuple(ins), tuple(outs), node.place)
        steps.append(lambda run: run.call(call))
        if listed is not None:
            steps.append(unpacking(outs[0], self._results(listed, scope), node.place))

    def _scalar(
        self, node: Node, function: Callable[..., Any], scope: Scope, steps: list[Step], *, takes_tensors: bool = False
    ) -> None:
        ins = [self._operand(value, scope, steps) for value in node.values]
        (out,) = self._results(node.outputs, scope)
        kind = node.target

        def step(run: Run) -> None:
            values = [run.values[i] for i in ins]
            if not takes_tensors and any(isinstance(value, Tensor) for value in values):
                refusing(kind, node.place, "it takes numbers, and a tensor came")(run)
            run.values[out] = function(*values)
            run.tainted[out] = not takes_tensors and any(run.tainted[i] for i in ins)

        steps.append(step)

    def _reading(self, node: Node, read: Callable[[Tensor], Any], scope: Scope, steps: list[Step]) -> None:
        source = self._operand(node.values[0], scope, steps)
        (out,) = self._results(node.outputs, scope)

        def step(run: Run) -> None:
            value = run.values[out] = read(run.values[source])
            run.tainted[out] = False
            if run.tainted[source]:
                run.read_number(value)

        steps.append(step)

    def _assertion(self, node: Node, name: str, arguments: list[Any], scope: Scope, steps: list[Step]) -> None:
        ins = [self._operand(value, scope, steps) for value in arguments]
        self._results(node.outputs, scope)

        def step(run: Run) -> None:
            wrong = unmet(name, [run.values[i] for i in ins])
            if wrong is not None:
                raise EngineError(
                    "invalid_inputs",
                    f"the model rejected its inputs: {wrong} ({node.place})",
                    param="inputs",
                    remedy="give inputs of the shapes and values that the model was exported for",
                )

        steps.append(step)

    # Higher-order operators

    def _block(
        self, graph: Graph, given: Sequence[Any], scope: Scope, steps: list[Step], parameters: frozenset[str]
    ) -> tuple[list[Step], list[int]]:
        """A subgraph on values of the graph around it: its steps, and the slots of its outputs."""
        inner: Scope = {}
        held = set()
        for formal, value in zip(graph.inputs, given, strict=True):
            if isinstance(formal, Ref):
                inner[formal.name] = self._operand(value, scope, steps)
                if isinstance(value, Ref) and value.name in parameters:
                    held.add(formal.name)
        made: list[Step] = []
        self._nodes(graph, inner, made, frozenset(held))
        return made, [self._operand(value, inner, made) for value in _flat(graph.outputs)]

    def _within(
        self, node: Node, context: Callable[[], ScriptContext], graph: Graph, given: Sequence[Any], *rest: Any
    ) -> None:
        """A subgraph inside a with-block."""
        scope, steps, parameters = rest
        inner, results = self._block(graph, given, scope, steps, parameters)
        outs = self._results(_flat(node.outputs), scope)
        if len(outs) != len(results):
            raise ValueError(f"{node.target} returns {len(outs)} values, its graph {len(results)}")

        def step(run: Run) -> None:
            entered = context()
            run.enter(entered)
            for each in inner:
                each(run)
            run.exit(entered)
            run.move(results, outs)

        steps.append(step)

    def _gradient_mode(self, node: Node, *rest: Any) -> None:
        enabled, graph, *given = node.values
        self._within(node, lambda: _context("set_grad_enabled", mode=bool(enabled)), graph, given, *rest)

    def _autocast(self, node: Node, *rest: Any) -> None:
        device, dtype, enabled, _, graph, *given = node.values
        fast = None if dtype is None else NUMBER_OF[dtype]
        options = {"device": device, "fast_dtype": fast, "_enabled": enabled is not False}
        self._within(node, lambda: _context("autocast", **options), graph, given, *rest)

    def _cond(self, node: Node, scope: Scope, steps: list[Step], parameters: frozenset[str]) -> None:
        predicate, if_true, if_false, *operands = node.values
        given = operands[0] if len(operands) == 1 and isinstance(operands[0], list) else operands
        condition = self._operand(predicate, scope, steps)
        branches = [self._block(graph, given, scope, steps, parameters) for graph in (if_true, if_false)]
        outs = self._results(_flat(node.outputs), scope)
        if any(len(results) != len(outs) for _, results in branches):
            raise ValueError("a branch of cond returns another number of values")

        def step(run: Run) -> None:
            taken = bool(run.values[condition])
            run.decide(taken)
            inner, results = branches[0 if taken else 1]
            for each in inner:
                each(run)
            run.move(results, outs)

        steps.append(step)


_BLOCKS: dict[str, Callable[..., None]] = {
    "cond": Compiled._cond,
    "wrap_with_set_grad_enabled": Compiled._gradient_mode,
    "wrap_with_autocast": Compiled._autocast,
}
"""Higher-order operators that are run; others are refused by name."""


def _context(kind: str, **attributes: Any) -> ScriptContext:
    context = ScriptContext(kind)
    context.attributes.update(attributes)
    return context


def _complete(overload: Any, named: Mapping[str, Any]) -> list[Any]:
    """All arguments in the schema's order, defaults where none is given."""
    formal = overload._schema.arguments
    unknown = named.keys() - {argument.name for argument in formal}
    missing = [a.name for a in formal if a.name not in named and not a.has_default_value()]
    if unknown or missing:
        raise ValueError(f"{overload} takes other arguments: unknown {sorted(unknown)}, missing {missing}")
    return [named.get(a.name, a.default_value) for a in formal]


def _trains(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a call is a layer in training mode."""
    flag = arguments.get("training", arguments.get("train", arguments.get("use_input_stats")))
    if "instance_norm" in name or flag is not True:
        return False
    return "dropout" not in name or arguments.get("p", 0) > 0


def _doubting(source: int, place: str) -> Step:
    """Decomposition writes both `detach` and `alias` as `alias`: where a gradient hangs on it, nobody knows which."""
    refuse = refusing(
        "aten::alias", place, "in a decomposed program it may stand for detach", "export without run_decompositions()"
    )

    def step(run: Run) -> None:
        if isinstance(run.values[source], Tensor) and run.values[source].requires_grad:
            refuse(run)

    return step


def _listing(ins: Sequence[int], out: int) -> Step:
    def step(run: Run) -> None:
        run.values[out] = [run.values[i] for i in ins]
        run.tainted[out] = any(run.tainted[i] for i in ins)

    return step


def _flat(values: Sequence[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list) else [value])]
