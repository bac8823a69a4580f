"""The tape: where a program consumes its parameters, and how.

A *tap* is one operator call that consumes a parameter: its inputs, its rule, and the gradient edge of its output,
taken at that moment (an in-place operator right after makes the output tensor itself the wrong thing to
differentiate by). Parameters are known by tensor identity, and so is what is made of them alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature_engine.calls import OperatorCall
from curvature_engine.chain import Links, anchor
from curvature_engine.differentiation import gradients
from curvature_engine.errors import EngineError, first_line, memory_ran_out
from curvature_engine.operators import FIRST_OUTPUT, MOVERS
from curvature_engine.rules import Match, Rule, Through
from curvature_engine.rules.matching import find_match
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.watched import Derivation, Watched

_ROWED = frozenset(("linear", "addmm", "matmul", "mm", "embedding"))
"""Whose outputs may have rows of samples although nothing of the batch entered, or only its shape: products with an
initial state, an embedding of positions that were expanded to the batch. They are tensors of their own, no views."""


@dataclass(frozen=True)
class Use:
    """A parameter's part in a tap."""

    watched: Watched
    role: str


@dataclass
class Tap:
    """One consumption of parameters.

    Attributes:
        rule: closed forms for this operator, or None (then its parameters go to the fallback).
        edges: gradient edges of the outputs (one, unless the operator has several).
        saved: what the rule needs of the operator's inputs, with their versions.
        static: whether nothing of the batch entered the operator.
        provisional: whether its output is tracked as derived, too: the tap serves if its rows turn out to be samples'
            (a recurrent layer's first product, with zeros), the derived tensor's consumers if not (a product with
            constant positions).
        stride: where the samples are proved to lie in the first output (see `SampleAxes`), if they are.
    """

    name: str
    rule: Rule | None
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    shapes: tuple[tuple[int, ...], ...]
    saved: tuple[Tensor, ...]
    versions: tuple[int, ...]
    static: bool
    place: str = ""
    provisional: bool = False
    stride: int | None = None

    @property
    def parameters(self) -> str:
        """The parameters consumed, for messages."""
        return ", ".join(dict.fromkeys(use.watched.parameter for use in self.uses))

    @property
    def intact(self) -> bool:
        """Whether the saved inputs are still what the operator saw."""
        return all(t._version == v for t, v in zip(self.saved, self.versions, strict=True))

    def let_go(self) -> None:
        """Hold the saved inputs no longer: nobody will ask for them again."""
        self.saved, self.versions = (), ()

    def shaped(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients that came to the edges, in the outputs' shapes."""
        return [None if g is None else g.reshape(s) for g, s in zip(gradients, self.shapes, strict=True)]


@dataclass
class Tape:
    """Records one forward pass.

    Attributes:
        links: all operators that the batch passes, where an extension needs them.
        twice: whether what it records must be differentiable twice.
        watched: by id, a parameter, a gather of one, or a tensor derived from one or several.
    """

    links: Links | None = None
    twice: bool = False
    watched: dict[int, tuple[Watched, ...]] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)
    superseded: set[int] = field(default_factory=set)
    """Provisional taps that cannot serve: past them, their parameter came in by another way as well."""
    _parameters: list[tuple[str, Sequence[Tensor]]] = field(default_factory=list)
    _place: str = ""
    _samples: SampleAxes = field(default_factory=SampleAxes)

    def watch(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Watch a parameter's tensors (several may be one parameter)."""
        for tensor in tensors:
            self.watched[id(tensor)] = (Watched(name, tensor, None, tensor._version, tuple(tensors)),)
        self._parameters.append((name, tensors))

    def restart(self) -> None:
        """Forget everything but the parameters."""
        parameters, self._parameters = self._parameters, []
        self.links = None if self.links is None else Links()
        self.watched.clear()
        self.taps.clear()
        self.superseded.clear()
        for name, tensors in parameters:
            self.watch(name, tensors)

    def observe(
        self, call: OperatorCall, arguments: Sequence[Any], result: Any, *, static: bool, samples: SampleAxes
    ) -> None:
        """See one operator call, `static` where nothing of the batch entered it; most touch no parameter."""
        if self.touches(arguments):
            self._place, self._samples = call.place, samples
            if static or call.writes or not self._record_simply(call, arguments, result):
                self._record(call, arguments, result, static)

    def touches(self, arguments: Sequence[Any]) -> bool:
        """Whether a parameter, or a gather of one, is among an operator's arguments."""
        watched = self.watched
        for argument in arguments:
            if id(argument) in watched:
                return True
            if type(argument) is list and any(id(a) in watched for a in argument):
                return True
        return False

    def observe_cast(self, source: Any, result: Any) -> None:
        """See a cast of one value to another."""
        found = self.watched.get(id(source), ())
        if not found or not result.requires_grad:
            return
        if all(w.intact for w in found):
            self._derive(found, [result])
        else:
            self._add("cast", None, tuple(Use(w, "generic") for w in found), [result], (), static=True)

    def _record_simply(self, call: OperatorCall, arguments: Sequence[Any], result: Any) -> bool:
        """The usual case of `_record` in few steps; False where it is another.

        The batch enters, nothing is edited, and one rule serves for all parameters, which come as they are.
        """
        if type(result) is not Tensor or id(result) in self.watched or not result.requires_grad or result.is_complex():
            return False
        positions: dict[int, Watched] = {}
        for place, argument in enumerate(arguments):
            found = self.watched.get(id(argument))
            if found is None:
                if type(argument) is list and any(id(a) in self.watched for a in argument):
                    return False
            elif len(found) > 1 or not found[0].intact:
                return False
            else:
                positions[place] = found[0]
        match = None if _autocasting(result) else find_match(call.name, arguments, positions, result)
        if match is None or match.through:
            return False
        if call.name in _ROWED:
            self._samples.adopt(result)
        uses = tuple([Use(positions[place], role) for place, role in match.roles.items()])
        self._add(call.name, match.rule, uses, [result], match.saved, static=False)
        return True

    def _record(self, call: OperatorCall, arguments: Sequence[Any], result: Any, static: bool) -> None:
        edited = arguments[0] if 0 in call.writes else None
        # An operator that returned a parameter itself (dropout in eval mode) consumed nothing.
        outputs = [
            r for r in shallow_tensors([result]) if r.requires_grad and (r is edited or id(r) not in self.watched)
        ]
        if not outputs:
            return
        plain = call.name.removesuffix("_")
        found = [w for a in shallow_tensors(arguments) for w in self.watched.get(id(a), ())]
        # Without a rule: an edited gather is one no more, and under autocast the operator saw rounded copies.
        known = id(edited) not in self.watched and all(w.intact for w in found) and not _autocasting(outputs[0])
        alone = known and static and not call.writes
        if alone and self._gather(plain, call, arguments, result):
            return
        match = self._match(plain, arguments, result, edited) if known else None
        if match is not None:
            if plain in _ROWED and not call.writes:
                self._samples.adopt(outputs[0])
            self._add(plain, match.rule, self._uses(match, arguments), outputs[:1], match.saved, static, alone)
        if alone and self._derive(found, outputs, None if match is None else len(self.taps) - 1):
            return
        if match is None:
            self._add(plain, None, tuple(Use(w, "generic") for w in found), outputs, (), static)

    def _uses(self, match: Match, arguments: Sequence[Any]) -> tuple[Use, ...]:
        spread = self._spread(arguments)
        return tuple(
            Use(_through(w, match.through.get(p)), role)
            for p, role in match.roles.items()
            for w in self.watched[id(spread[p])]
        )

    def _match(self, name: str, arguments: Sequence[Any], result: Any, edited: Tensor | None) -> Match | None:
        """The rule for a call, or None."""
        output = result[0] if name in FIRST_OUTPUT and isinstance(result, list | tuple) else result
        if not isinstance(output, Tensor) or output.is_complex():
            return None
        # Written into a part of a larger tensor, the output's own edge is not on the way back from that tensor.
        if edited is not None and edited._is_view():
            return None
        arguments = self._spread(arguments)
        positions = {i: self.watched[id(a)][0] for i, a in enumerate(arguments) if id(a) in self.watched}
        match = find_match(name, arguments, positions, output)
        return None if match is None or any(_same_memory(t, edited) for t in match.saved) else match

    def _spread(self, arguments: Sequence[Any]) -> list[Any]:
        """Arguments with lists that hold parameters written out, as in `cat([a, p], 1)`."""
        spread: list[Any] = []
        for argument in arguments:
            lists = isinstance(argument, list | tuple) and any(id(a) in self.watched for a in argument)
            spread.extend(argument if lists else [argument])
        return spread

    def _gather(self, name: str, call: OperatorCall, arguments: Sequence[Any], result: Any) -> bool:
        """Track an operator that only moves a parameter's elements. Returns whether it was one."""
        if name not in MOVERS and name != "embedding":
            return False
        if name == "embedding" and len(arguments) > 2 and arguments[2] >= 0:
            return False  # a padding row gets no gradient
        (watched, *more) = self.watched.get(id(arguments[0]), (None,))
        if watched is None or more or isinstance(watched.index, Derivation):
            return False
        if any(id(a) in self.watched for a in shallow_tensors(arguments[1:])):
            return False
        for place, tensor in enumerate(shallow_tensors([result])):

            def move(index: Tensor, place: int = place) -> Tensor:
                return shallow_tensors([call.invoke([index, *arguments[1:]])])[place]

            if id(tensor) not in self.watched:
                self.watched[id(tensor)] = (watched.moved(tensor, move),)
        return True

    def _derive(self, found: Sequence[Watched], outputs: Sequence[Tensor], origin: int | None = None) -> bool:
        """Track what was made of parameters alone. Returns whether it can be."""
        if any(o.is_complex() for o in outputs):
            return False
        sources: dict[str, Watched] = {}
        for w in found:
            other = sources.setdefault(w.parameter, w)
            if other.origins != w.origins:
                self.superseded |= other.origins | w.origins
        for tensor in outputs:
            self.watched[id(tensor)] = tuple(w.derived(tensor, origin) for w in sources.values())
        return True

    def _add(
        self,
        name: str,
        rule: Rule | None,
        uses: tuple[Use, ...],
        outputs: Sequence[Tensor],
        saved: tuple[Tensor, ...],
        static: bool,
        provisional: bool = False,
    ) -> None:
        self.taps.append(
            Tap(
                name,
                rule,
                uses,
                tuple(get_gradient_edge(o if rule is None else anchor(o)) for o in outputs),
                tuple(tuple(o.shape) for o in outputs),
                tuple(t.detach() for t in saved),
                tuple(t._version for t in saved),
                static,
                self._place,
                provisional,
                self._samples.stride(outputs[0]),
            )
        )


def backward(
    outputs: Tensor | GradientEdge,
    targets: Sequence[Any],
    cotangent: Tensor,
    *,
    create_graph: bool = False,
    last: bool = False,
) -> list[Tensor | None]:
    """One ordinary backward to tensors and edges; None where nothing can arrive.

    `create_graph` makes the result differentiable itself. After the `last` one the graph is gone.

    Raises:
        EngineError: `unsupported_model` where the program cannot be differentiated, `out_of_memory`.
    """
    if not targets:
        return []
    try:
        given = cotangent.to(outputs.dtype) if isinstance(outputs, Tensor) else cotangent
        found = gradients(outputs, targets, given, retain_graph=not last, create_graph=create_graph)
    except RuntimeError as error:
        if memory_ran_out(error):
            raise EngineError(
                "out_of_memory", "memory ran out in the backward pass", remedy="use a smaller batch"
            ) from error
        raise EngineError(
            "unsupported_model",
            f"the model cannot be differentiated: {first_line(error)}",
            param="model",
            remedy="check that backward() works on the model's own loss; an in-place edit may be the cause",
        ) from error
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]


def _through(watched: Watched, function: Through | None) -> Watched:
    if function is None:
        return watched
    return watched.first_row() if function == "first row" else watched.reciprocal()


def _same_memory(tensor: Tensor, edited: Tensor | None) -> bool:
    return edited is not None and tensor.untyped_storage().data_ptr() == edited.untyped_storage().data_ptr()


def _autocasting(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def shallow_tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors in `values`, one level of lists and tuples deep."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found
