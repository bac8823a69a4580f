"""Finds the rule of an operator call; of the commonest operators once for all calls of such shapes."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from curvature_engine.rules import RULES
from curvature_engine.rules.base import Match, Rule
from curvature_engine.rules.convolution import match_convolution
from curvature_engine.rules.linear import match_addmm, match_linear

_OF_SHAPES = frozenset((match_addmm, match_convolution, match_linear))
"""Matchers whose rules follow from arguments that are no tensors, and of tensors from their shapes alone."""
_MOST_KNOWN = 4096


class _Known(NamedTuple):
    """A rule found before; `saved` are the places of the arguments to keep."""

    rule: Rule
    roles: Mapping[int, str]
    saved: tuple[int, ...]


_KNOWN: dict[Hashable, _Known] = {}


def find_match(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """The rule for a call whose argument positions `watched` hold parameters, all of which it serves; or None."""
    matchers = RULES.get(name, ())
    key = _key_of(name, arguments, watched, output) if len(matchers) == 1 and matchers[0] in _OF_SHAPES else None
    known = None if key is None else _KNOWN.get(key)
    if known is not None:
        return Match(known.rule, known.roles, tuple([arguments[place] for place in known.saved]))
    for matcher in matchers:
        match = matcher(name, arguments, watched, output)
        if match is not None and match.roles.keys() == watched.keys():
            if key is not None:
                _remember(key, match, arguments)
            return match
    return None


def _key_of(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Hashable | None:
    """All that such a rule follows from; None where that is not hashable."""
    key: list[Hashable] = [name, *watched, output.shape]
    for argument in arguments:
        if isinstance(argument, Tensor):
            key.append(argument.shape)
        elif type(argument) is list:
            key.append(tuple(argument))
        else:
            key.append((type(argument), argument))
    found = tuple(key)
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _remember(key: Hashable, match: Match, arguments: Sequence[Any]) -> None:
    places = {id(a): place for place, a in enumerate(arguments)}
    saved = [places.get(id(t)) for t in match.saved]
    if match.through or None in saved:
        return
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    match.rule.key = key
    _KNOWN[key] = _Known(match.rule, match.roles, tuple([place for place in saved if place is not None]))
