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

from curvature_engine.operators import MOVERS
from curvature_engine.rules import RULES, Rule


@dataclass(frozen=True)
class Watched:
    """A parameter, or a gather of its elements.

    `index` holds, in the gathered tensor's shape, each element's position in the flattened parameter; None means the
    parameter as it is.
    """

    parameter: str
    tensor: Tensor
    index: Tensor | None


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
    def intact(self) -> bool:
        """Whether the saved inputs are still what the operator saw."""
        return all(t._version == v for t, v in zip(self.saved, self.versions, strict=True))


@dataclass
class Tape:
    """Records one forward pass."""

    watched: dict[int, Watched] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)
    _place: str = ""

    def watch(self, name: str, tensor: Tensor) -> None:
        """Watch a parameter's tensor (several tensors may be one parameter)."""
        self.watched[id(tensor)] = Watched(name, tensor, None)

    def observe(
        self, name: str, overload: Any, arguments: Sequence[Any], result: Any, *, static: bool, place: str
    ) -> None:
        """See one operator call; most touch no parameter."""
        watched = self.watched
        touched = False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if id(argument) in watched:
                    touched = True
                    break
            elif isinstance(argument, list) and any(id(a) in watched for a in argument):
                touched = True
                break
        if touched:
            self._place = place
            self._record(name, overload, arguments, result, static)

    def record_generic(self, arguments: Sequence[Any], result: Any, *, static: bool) -> None:
        """Record a consumption that has no rule."""
        found = [self.watched[id(a)] for a in _flat(arguments) if id(a) in self.watched]
        if found:
            self._add("cast", None, tuple(Use(w, "generic") for w in found), result, (), static)

    def _record(self, name: str, overload: Any, arguments: Sequence[Any], result: Any, static: bool) -> None:
        # An operator that returned a parameter itself (dropout in eval mode) consumed nothing.
        outputs = [r for r in _flat([result]) if r.requires_grad and id(r) not in self.watched]
        if not outputs:
            return
        plain = name.removesuffix("_")
        if static and self._gather(plain, overload, arguments, result):
            return
        positions = {i: self.watched[id(a)] for i, a in enumerate(arguments) if id(a) in self.watched}
        in_lists = any(id(a) in self.watched for v in arguments if isinstance(v, list) for a in v)
        if not in_lists and len(outputs) == 1 and not isinstance(result, list):
            for matcher in RULES.get(plain, ()):
                match = matcher(plain, arguments, positions, outputs[0])
                if match is not None:
                    uses = tuple(Use(positions[p], role) for p, role in match.roles.items())
                    self._add(plain, match.rule, uses, result, match.saved, static)
                    return
        found = [self.watched[id(a)] for a in _flat(arguments) if id(a) in self.watched]
        self._add(plain, None, tuple(Use(w, "generic") for w in found), result, (), static)

    def _gather(self, name: str, overload: Any, arguments: Sequence[Any], result: Any) -> bool:
        """Track an operator that only moves a parameter's elements. Returns whether it was one."""
        source = 0
        if name not in MOVERS and name != "embedding":
            return False
        if name == "embedding" and len(arguments) > 2 and arguments[2] >= 0:
            return False  # a padding row gets no gradient: leave that to the rule
        watched = self.watched.get(id(arguments[source]))
        if watched is None or any(id(a) in self.watched for a in _flat(arguments[1:])):
            return False
        index = watched.index
        if index is None:
            index = torch.arange(watched.tensor.numel(), device=watched.tensor.device).view(watched.tensor.shape)
        with torch.no_grad():
            moved = overload(index, *arguments[1:])
        tensors, indices = _flat([result]), _flat([moved])
        for tensor, moved_index in zip(tensors, indices, strict=True):
            if id(tensor) not in self.watched:
                self.watched[id(tensor)] = Watched(watched.parameter, tensor, moved_index)
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
                tuple(get_gradient_edge(o) for o in outputs),
                tuple(tuple(o.shape) for o in outputs),
                tuple(t.detach() for t in saved),
                tuple(t._version for t in saved),
                static,
                self._place,
            )
        )


def _flat(values: Sequence[Any]) -> list[Tensor]:
    """The tensors in `values`, one level of lists and tuples deep."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found
