"""The TorchScript front end: the inlined graph of a module's forward, compiled to a list of steps.

Each node becomes one Python closure over slots of a value table, compiled once per program; nothing is looked up by
name while it runs. Tensor operators resolve, through their schema, to the dispatcher's overload, so that the kernels
are those TorchScript itself would call.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from curvature_engine import operators, scalars
from curvature_engine.calls import OperatorCall
from curvature_engine.contexts import make_context
from curvature_engine.errors import EngineError
from curvature_engine.execution import Run, map_tensors
from curvature_engine.places import place_of
from curvature_engine.steps import Step, execute, explained, refusing, unpacking
from curvature_engine.tensor_methods import DTYPE_OF, METHODS, NUMBER_OF, TENSOR_QUESTIONS, read_dtype

_FOREIGN_ACCELERATED = ("mkldnn", "quantized", "prepacked", "cudnn", "tensorexpr", "mps", "xnnpack")


def compile_graph(graph: Any, device: torch.device) -> "Compiled":
    """Compile an inlined TorchScript graph for `device`.

    Constants that a trace baked in for another device are remapped.

    Raises:
        EngineError: `unsupported_operator` for nodes that no run could pass.
    """
    return Compiled(graph, device)


class Compiled:
    """A compiled graph: call `run` with the module's object and the forward's arguments."""

    def __init__(self, graph: Any, device: torch.device) -> None:
        self._device = device
        self._slots: dict[str, int] = {}
        self._constants: list[tuple[int, Any]] = []
        self.edits_tensors = False
        """Whether an operator that edits tensors appears anywhere: then each run works on copies."""
        self.asks_layout = False
        """Whether it asks how tensors lie in memory."""
        self.calls: Counter[str] = Counter()
        """How often each tensor operator appears, all branches counted."""
        self.refused: list[tuple[str, str]] = []
        """(operator, place) of what no run could pass."""
        self._attributes: dict[int, tuple[int, str, int]] = {}
        """Number of a step that only reads an attribute → owner's slot, name, slot."""
        self._sets_attributes = False
        inputs = list(graph.inputs())
        self._inputs = [self._slot(value) for value in inputs]
        self._output = self._slot(next(iter(graph.outputs())))
        self._steps = self._main(graph)
        self._folded = False

    def run(self, run: Run, arguments: list[Any]) -> Any:
        """Execute on `arguments` (the module's object first, always the same); returns what forward returns."""
        if not self._folded:
            self._fold(arguments[0])
        run.values = [None] * len(self._slots)
        run.tainted = [False] * len(self._slots)
        for slot, value in self._constants:
            run.values[slot] = map_tensors(run.private, value) if self.edits_tensors else value
        for slot, value in zip(self._inputs, arguments, strict=True):
            run.values[slot] = map_tensors(run.private, value) if self.edits_tensors else value
            run.tainted[slot] = slot != self._inputs[0]
        run.begin(run.values[slot] for slot in self._inputs[1:])
        execute(run, self._steps)
        return run.values[self._output]

    def _main(self, graph: Any) -> list[tuple[Step, str, list[int]]]:
        """The steps of the graph itself, with their places, and the slots that no later one reads."""
        nodes = [node for node in graph.nodes() if node.kind() != "prim::Constant"]
        steps: list[tuple[Step, str]] = []
        for node in graph.nodes():
            step = self._node(node)
            if step is not None:
                if node.kind() == "prim::GetAttr":
                    self._attributes[len(steps)] = self._slot(node.input()), node.s("name"), self._slot(node.output())
                steps.append((step, place_of(node)))
        return [(*step, spent) for step, spent in zip(steps, self._find_spent(nodes, graph), strict=True)]

    def _fold(self, module: Any) -> None:
        """Read once what every run would read again: submodules, parameters and buffers that no run replaces."""
        self._folded = True
        if self._sets_attributes:
            return
        known, folded = {self._inputs[0]: module}, set()
        for number, (owner, name, slot) in self._attributes.items():
            value = known[owner].getattr(name) if owner in known else None
            if isinstance(value, torch.Tensor | torch._C.ScriptObject):
                known[slot] = value
                folded.add(number)
        del known[self._inputs[0]]
        self._constants.extend(known.items())
        self._steps = [step for number, step in enumerate(self._steps) if number not in folded]

    def _find_spent(self, nodes: Sequence[Any], graph: Any) -> list[list[int]]:
        """Per step, the slots that no later one reads. What is made before a run begins stays."""
        lasting = {self._output, *self._inputs, *(slot for slot, _ in self._constants)}
        spent: list[list[int]] = [[] for _ in nodes]
        for place in reversed(range(len(nodes))):
            touched = self._touched(nodes[place]) - lasting
            spent[place] = sorted(touched)
            lasting |= touched
        return spent

    def _touched(self, node: Any) -> set[int]:
        """The slots that a node and its blocks read or write."""
        found = {self._slot(value) for value in (*node.inputs(), *node.outputs())}
        for block in node.blocks():
            found |= {self._slot(value) for value in (*block.inputs(), *block.outputs())}
            for inner in block.nodes():
                found |= self._touched(inner)
        return found

    def _slot(self, value: Any) -> int:
        return self._slots.setdefault(value.debugName(), len(self._slots))

    def _block(self, block: Any) -> list[Step]:
        """The steps of a branch or a loop's body."""
        steps = ((self._node(node), place_of(node)) for node in block.nodes())
        return [explained(step, place) for step, place in steps if step is not None]

    def _node(self, node: Any) -> Step | None:
        kind: str = node.kind()
        handler = _HANDLERS.get(kind)
        if handler is not None:
            step = handler(self, node)
        elif kind.startswith("aten::"):
            step = self._operator(node)
        elif kind in scalars.OPERATORS:
            step = self._scalar(node)
        else:
            step = self._refuse(node)
        return step

    # Values

    def _constant(self, node: Any) -> Step | None:
        output = node.output()
        value = output.toIValue()
        if isinstance(value, torch.device):
            value = self._device
        elif isinstance(value, torch.Tensor):
            value = value.to(self._device)
        self._constants.append((self._slot(output), value))
        return None

    def _get_attribute(self, node: Any) -> Step:
        owner, name, out = self._slot(node.input()), node.s("name"), self._slot(node.output())

        def step(run: Run) -> None:
            run.values[out] = run.attribute(run.values[owner], name)
            run.tainted[out] = run.is_of_batch(run.values[owner], name)

        return step

    def _set_attribute(self, node: Any) -> Step:
        owner, value = (self._slot(v) for v in node.inputs())
        name, self._sets_attributes = node.s("name"), True

        def step(run: Run) -> None:
            run.set_attribute(run.values[owner], name, run.values[value], tainted=run.tainted[value])

        return step

    def _construct(self, node: Any, make: Callable[[list[Any]], Any]) -> Step:
        ins, out = [self._slot(v) for v in node.inputs()], self._slot(node.output())

        def step(run: Run) -> None:
            run.values[out] = make([run.values[i] for i in ins])
            run.tainted[out] = any(run.tainted[i] for i in ins)

        return step

    def _list(self, node: Any) -> Step:
        return self._construct(node, list)

    def _tuple(self, node: Any) -> Step:
        return self._construct(node, tuple)

    def _dict(self, node: Any) -> Step:
        return self._construct(node, lambda values: dict(zip(values[::2], values[1::2], strict=True)))

    def _unpack(self, node: Any) -> Step:
        return unpacking(self._slot(node.input()), [self._slot(v) for v in node.outputs()], place_of(node))

    def _tuple_slice(self, node: Any) -> Step:
        begin, end = node.i("beg"), node.i("end")
        return self._construct(node, lambda values: values[0][begin:end])

    def _uninitialized(self, node: Any) -> Step:
        return self._construct(node, lambda values: None)

    # Control flow

    def _if(self, node: Any) -> Step:
        condition = self._slot(node.input())
        outs = [self._slot(v) for v in node.outputs()]
        branches = [(self._block(block), [self._slot(v) for v in block.outputs()]) for block in node.blocks()]
        (then_steps, then_outs), (else_steps, else_outs) = branches

        def step(run: Run) -> None:
            taken = bool(run.values[condition])
            run.decide(taken)
            for inner in then_steps if taken else else_steps:
                inner(run)
            run.move(then_outs if taken else else_outs, outs)

        return step

    def _loop(self, node: Any) -> Step:
        ins = [self._slot(v) for v in node.inputs()]
        outs = [self._slot(v) for v in node.outputs()]
        block = next(iter(node.blocks()))
        block_ins = [self._slot(v) for v in block.inputs()]
        steps = self._block(block)
        block_outs = [self._slot(v) for v in block.outputs()]

        def step(run: Run) -> None:
            limit, going = run.values[ins[0]], bool(run.values[ins[1]])
            run.move(ins[2:], block_ins[1:])
            count = 0
            while going and count < limit:
                run.go_round()
                run.values[block_ins[0]] = count
                run.tainted[block_ins[0]] = False
                for inner in steps:
                    inner(run)
                going = bool(run.values[block_outs[0]])
                run.move(block_outs[1:], block_ins[1:])
                count += 1
            run.decide(count)
            run.move(block_ins[1:], outs)

        return step

    def _raise(self, node: Any) -> Step:
        message, place = self._slot(next(iter(node.inputs()))), place_of(node)

        def step(run: Run) -> None:
            raise EngineError(
                "invalid_inputs",
                f"the model rejected its inputs: {run.values[message]} ({place})",
                param="inputs",
                remedy="give inputs of the shapes and types that the model was written for",
            )

        return step

    # Context managers

    def _create_object(self, node: Any) -> Step:
        name, place = str(node.output().type()), place_of(node)
        out = self._slot(node.output())

        def step(run: Run) -> None:
            run.values[out] = make_context(name, place)

        return step

    def _enter(self, node: Any) -> Step:
        source, outs = self._slot(node.input()), [self._slot(v) for v in node.outputs()]

        def step(run: Run) -> None:
            run.enter(run.values[source])
            for out in outs:
                run.values[out] = run.values[source]

        return step

    def _exit(self, node: Any) -> Step:
        source = self._slot(next(iter(node.inputs())))

        def step(run: Run) -> None:
            run.exit(run.values[source])

        return step

    # Operators

    def _scalar(self, node: Any) -> Step:
        function = scalars.OPERATORS[node.kind()]
        ins, outs = [self._slot(v) for v in node.inputs()], [self._slot(v) for v in node.outputs()]
        made = next((v.type().kind() for v in node.outputs()), "")
        as_typed = scalars.TYPED.get(made, scalars.as_it_is)
        if node.kind() == "aten::pow" and made == "IntType":
            function = scalars.integer_power

        def step(run: Run) -> None:
            result = as_typed(function(*[run.values[i] for i in ins]))
            tainted = any(run.tainted[i] for i in ins)
            if tainted and ins:  # appending a batch-dependent tensor makes the whole list so
                run.put_batch_into(ins[0])
            for out in outs[:1]:
                run.values[out] = result
                run.tainted[out] = tainted

        return step

    def _operator(self, node: Any) -> Step:
        kind: str = node.kind()
        name = kind.removeprefix("aten::")
        takes_tensor = any(_holds_tensor(v.type()) for v in node.inputs())
        makes_tensor = any(_holds_tensor(v.type()) for v in node.outputs())
        containers = any(v.type().kind() in ("ListType", "DictType", "StringType", "TupleType") for v in node.inputs())
        first = next(iter(node.inputs()), None)
        on_container = first is not None and first.type().kind() in ("ListType", "DictType", "StringType")
        if kind in scalars.OPERATORS and (
            (on_container and kind in _CONTAINER_OPERATORS) or not (takes_tensor or makes_tensor)
        ):
            return self._scalar(node)
        if name in ("__is__", "__isnot__", "warn", "format", "percentFormat", "dict", "__contains__") or (
            containers and name in ("list",)
        ):
            return self._scalar(node)
        special = TENSOR_QUESTIONS.get(name)
        if special is not None and not makes_tensor:
            self.asks_layout = self.asks_layout or name in operators.LAYOUT_QUESTIONS
            return self._question(node, special)
        if name in operators.REFUSED or name.removesuffix("_") in operators.REFUSED:
            return self._refuse(node)
        if not operators.is_allowed(name):
            return self._refuse(node)
        return self._call(node, name)

    def _question(self, node: Any, function: Callable[..., Any]) -> Step:
        ins, out = [self._slot(v) for v in node.inputs()], self._slot(node.output())
        reads = node.kind().rpartition("::")[2] in operators.READINGS

        def step(run: Run) -> None:
            value = run.values[out] = function(*[run.values[i] for i in ins])
            run.tainted[out] = False
            if reads and any(run.tainted[i] for i in ins):
                run.read_number(value)

        return step

    def _call(self, node: Any, name: str) -> Step:
        self.calls[name] += 1
        schema = torch._C.parse_schema(node.schema())
        ins, outs = [self._slot(v) for v in node.inputs()], [self._slot(v) for v in node.outputs()]
        if name == "tensor" or name == "as_tensor":
            return self._make_tensor(node)
        packet = getattr(torch.ops.aten, name, None)
        overload = None if packet is None else getattr(packet, schema.overload_name or "default", None)
        if overload is None:
            return self._method(node, name)
        positional = sum(not argument.kwarg_only for argument in schema.arguments)
        keywords = tuple(argument.name for argument in schema.arguments[positional:])
        formal = overload._schema.arguments
        writes = tuple(i for i, a in enumerate(formal) if a.alias_info is not None and a.alias_info.is_write)
        self.edits_tensors = self.edits_tensors or bool(writes)
        call = OperatorCall(name, overload, positional, keywords, writes, tuple(ins), tuple(outs), place_of(node))

        def step(run: Run) -> None:
            run.call(call)

        return step

    def _method(self, node: Any, name: str) -> Step:
        """Operators that TorchScript has as a method only: casts, and `to` in its older forms."""
        if name not in METHODS:
            return self._refuse(node)
        ins, out = [self._slot(v) for v in node.inputs()], self._slot(node.output())
        function = METHODS[name]

        def step(run: Run) -> None:
            values = [run.values[i] for i in ins]
            run.values[out] = function(*values)
            run.tainted[out] = any(run.tainted[i] for i in ins)
            run.note_cast(values[0], run.values[out])

        return step

    def _make_tensor(self, node: Any) -> Step:
        ins, out = [self._slot(v) for v in node.inputs()], self._slot(node.output())

        def step(run: Run) -> None:
            data, dtype, *_ = (run.values[i] for i in ins)
            if isinstance(data, torch.Tensor):  # `as_tensor` of a tensor is that tensor, with its history
                run.values[out] = data if dtype is None else data.to(DTYPE_OF[dtype])
                run.tainted[out] = run.tainted[ins[0]]
                run.note_cast(data, run.values[out])
                return
            run.values[out] = torch.tensor(data, dtype=read_dtype(dtype), device=run.device)
            run.tainted[out] = False

        return step

    def _refuse(self, node: Any) -> Step:
        kind, place = node.kind(), place_of(node)
        self.refused.append((kind, place))
        plain = kind.removeprefix("aten::")
        reason, remedy = operators.REFUSED.get(plain.removesuffix("_"), ("", ""))
        if any(mark in kind for mark in _FOREIGN_ACCELERATED):
            reason, remedy = "the file was optimised for inference", "save the module before optimising it"
        return refusing(kind, place, reason, remedy)


_CONTAINER_OPERATORS = frozenset(
    f"aten::{name}"
    for name in (
        *("append", "extend", "insert", "remove", "pop", "clear", "reverse", "sort", "copy", "list", "index", "count"),
        *("keys", "values", "items", "get", "setdefault", "update", "__getitem__", "_set_item", "Delete", "len"),
        *("slice", "__contains__", "add", "mul", "eq", "ne", "join", "startswith", "endswith", "lower", "upper"),
        *("format",),
    )
)


def _holds_tensor(type_: Any) -> bool:
    return type_.isSubtypeOf(torch._C.TensorType.get()) or (
        type_.kind() in ("ListType", "OptionalType") and _holds_tensor(type_.getElementType())
    )


def _property(read: Callable[[Any], Any]) -> Callable[[Compiled, Any], Step]:
    def handler(compiled: Compiled, node: Any) -> Step:
        return compiled._question(node, read)

    return handler


def _as_scalar(compiled: Compiled, node: Any) -> Step:
    return compiled._scalar(node)


def _number_to_tensor(compiled: Compiled, node: Any) -> Step:
    return compiled._construct(node, lambda values: torch.tensor(values[0]))


_HANDLERS: dict[str, Callable[[Compiled, Any], Step | None]] = {
    "prim::Constant": Compiled._constant,
    "prim::GetAttr": Compiled._get_attribute,
    "prim::SetAttr": Compiled._set_attribute,
    "prim::ListConstruct": Compiled._list,
    "prim::TupleConstruct": Compiled._tuple,
    "prim::DictConstruct": Compiled._dict,
    "prim::ListUnpack": Compiled._unpack,
    "prim::TupleUnpack": Compiled._unpack,
    "prim::TupleIndex": lambda c, n: c._construct(n, lambda v: v[0][v[1]]),
    "prim::TupleSlice": Compiled._tuple_slice,
    "prim::Uninitialized": Compiled._uninitialized,
    "prim::If": Compiled._if,
    "prim::Loop": Compiled._loop,
    "prim::RaiseException": Compiled._raise,
    "prim::CreateObject": Compiled._create_object,
    "prim::Enter": Compiled._enter,
    "prim::Exit": Compiled._exit,
    "prim::NumToTensor": _number_to_tensor,
    "prim::dtype": _property(lambda t: NUMBER_OF[t.dtype]),
    "prim::device": _property(lambda t: t.device),
    "prim::layout": _property(lambda t: 0),
    "prim::is_cuda": _property(lambda t: t.is_cuda),
    "prim::is_cpu": _property(lambda t: t.device.type == "cpu"),
    "prim::is_mps": _property(lambda t: False),
    "prim::is_xpu": _property(lambda t: False),
    "prim::is_nested": _property(lambda t: t.is_nested),
    "prim::is_sparse": _property(lambda t: t.is_sparse),
    "prim::is_quantized": _property(lambda t: False),
    "prim::is_mkldnn": _property(lambda t: False),
    "prim::requires_grad": _property(lambda t: t.requires_grad),
    "prim::ndim": _property(lambda t: t.dim()),
    "prim::itemsize": _property(lambda t: t.element_size()),
    "prim::type": _property(lambda d: d.type),
    "prim::tolist": _property(lambda t, *r: t.tolist()),
    "prim::data": lambda c, n: c._construct(n, lambda v: v[0].detach()),
    "prim::min": _as_scalar,
    "prim::max": _as_scalar,
    "prim::abs": _as_scalar,
}
