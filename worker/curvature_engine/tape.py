"""The tape: where a program consumes its parameters, and how.

A *tap* is one operator call that consumes a parameter: its inputs, its rule, and the gradient edge of its output,
taken at that moment (an in-place operator right after makes the output tensor itself the wrong thing to
differentiate by). Parameters are known by tensor identity. Operators that only move elements (transpose, slice, an
embedding of constant positions …) give a *gather* of the parameter, tracked by applying them to its indices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature_engine.calls import OperatorCall
from curvature_engine.chain import Links, anchor
from curvature_engine.errors import EngineError, first_line, memory_ran_out
from curvature_engine.operators import MOVERS
from curvature_engine.rules import RULES, Match, Rule


@dataclass(frozen=True)
class Watched:
    """A parameter, or a gather of its elements.

    `index` holds, in the gathered tensor's shape, each element's position in the flattened parameter; None means the
    parameter as it is.
    """

    parameter: str
    tensor: Tensor
    index: Tensor | None
    version: int

    @property
    def intact(self) -> bool:
        """Whether the tensor still holds the parameter's elements: a gather may have been edited since."""
        return self.tensor._version == self.version


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

    @property
    def parameters(self) -> str:
        """The parameters consumed, for messages."""
        return ", ".join(dict.fromkeys(use.watched.parameter for use in self.uses))

    @property
    def intact(self) -> bool:
        """Whether the saved inputs are still what the operator saw."""
        return all(t._version == v for t, v in zip(self.saved, self.versions, strict=True))

    def shaped(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients that came to the edges, in the outputs' shapes."""
        return [None if g is None else g.reshape(s) for g, s in zip(gradients, self.shapes, strict=True)]


@dataclass
class Tape:
    """Records one forward pass.

    Attributes:
        links: all operators that the batch passes, where an extension needs them.
    """

    links: Links | None = None
    watched: dict[int, Watched] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)
    _place: str = ""

    def watch(self, name: str, tensor: Tensor) -> None:
        """Watch a parameter's tensor (several tensors may be one parameter)."""
        self.watched[id(tensor)] = Watched(name, tensor, None, tensor._version)

    def observe(self, call: OperatorCall, arguments: Sequence[Any], result: Any, *, static: bool) -> None:
        """See one operator call, `static` where nothing of the batch entered it; most touch no parameter."""
        if self.touches(arguments):
            self._place = call.place
            self._record(call, arguments, result, static)

    def touches(self, arguments: Sequence[Any]) -> bool:
        """Whether a parameter, or a gather of one, is among an operator's arguments."""
        watched = self.watched
        for argument in arguments:
            if isinstance(argument, Tensor):
                if id(argument) in watched:
                    return True
            elif isinstance(argument, list) and any(id(a) in watched for a in argument):
                return True
        return False

    def record_generic(self, arguments: Sequence[Any], result: Any, *, static: bool) -> None:
        """Record a consumption that has no rule."""
        found = [self.watched[id(a)] for a in _flat(arguments) if id(a) in self.watched]
        if found:
            self._add("cast", None, tuple(Use(w, "generic") for w in found), result, (), static)

    def _record(self, call: OperatorCall, arguments: Sequence[Any], result: Any, static: bool) -> None:
        edited = arguments[0] if 0 in call.writes else None
        # An operator that returned a parameter itself (dropout in eval mode) consumed nothing.
        outputs = [r for r in _flat([result]) if r.requires_grad and (r is edited or id(r) not in self.watched)]
        if not outputs:
            return
        plain = call.name.removesuffix("_")
        found = [self.watched[id(a)] for a in _flat(arguments) if id(a) in self.watched]
        # Without a rule: an edited gather is one no more, and under autocast the operator saw rounded copies.
        known = id(edited) not in self.watched and all(w.intact for w in found) and not _autocasting(outputs[0])
        if known and static and self._gather(plain, call, arguments, result):
            return
        match = self._match(plain, arguments, result, edited) if known else None
        if match is None:
            self._add(plain, None, tuple(Use(w, "generic") for w in found), result, (), static)
            return
        uses = tuple(Use(self.watched[id(arguments[p])], role) for p, role in match.roles.items())
        self._add(plain, match.rule, uses, result, match.saved, static)

    def _match(self, name: str, arguments: Sequence[Any], result: Any, edited: Tensor | None) -> Match | None:
        """The rule for a call, or None."""
        if not isinstance(result, Tensor) or result.is_complex():
            return None
        if any(id(a) in self.watched for v in arguments if isinstance(v, list) for a in v):
            return None
        # Written into a part of a larger tensor, the output's own edge is not on the way back from that tensor.
        if edited is not None and edited._is_view():
            return None
        positions = {i: self.watched[id(a)] for i, a in enumerate(arguments) if id(a) in self.watched}
        for matcher in RULES.get(name, ()):
            match = matcher(name, arguments, positions, result)
            if match is not None and not any(_same_memory(t, edited) for t in match.saved):
                return match
        return None

    def _gather(self, name: str, call: OperatorCall, arguments: Sequence[Any], result: Any) -> bool:
        """Track an operator that only moves a parameter's elements. Returns whether it was one."""
        if name not in MOVERS and name != "embedding":
            return False
        if name == "embedding" and len(arguments) > 2 and arguments[2] >= 0:
            return False  # a padding row gets no gradient: leave that to the rule
        watched = self.watched.get(id(arguments[0]))
        if watched is None or any(id(a) in self.watched for a in _flat(arguments[1:])):
            return False
        index = watched.index
        if index is None:
            index = torch.arange(watched.tensor.numel(), device=watched.tensor.device).view(watched.tensor.shape)
        with torch.no_grad():
            moved = call.invoke([index, *arguments[1:]])
        for tensor, moved_index in zip(_flat([result]), _flat([moved]), strict=True):
            if id(tensor) not in self.watched:
                self.watched[id(tensor)] = Watched(watched.parameter, tensor, moved_index, tensor._version)
        return True

    def _add(
        self, name: str, rule: Rule | None, uses: tuple[Use, ...], result: Any, saved: tuple[Tensor, ...], static: bool
    ) -> None:
        outputs = [r for r in _flat([result]) if r.requires_grad]
        if not outputs:
            return
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
            )
        )


def backward(
    outputs: Tensor, targets: Sequence[Any], cotangent: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """One ordinary backward to tensors and edges; None where nothing can arrive.

    `create_graph` makes the result differentiable itself.

    Raises:
        EngineError: `unsupported_model` where the program cannot be differentiated, `out_of_memory`.
    """
    if not targets:
        return []
    try:
        found = torch.autograd.grad(
            outputs,
            list(targets),
            cotangent.to(outputs.dtype),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
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


def _same_memory(tensor: Tensor, edited: Tensor | None) -> bool:
    return edited is not None and tensor.untyped_storage().data_ptr() == edited.untyped_storage().data_ptr()


def _autocasting(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _flat(values: Sequence[Any]) -> list[Tensor]:
    """The tensors in `values`, one level of lists and tuples deep."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found
