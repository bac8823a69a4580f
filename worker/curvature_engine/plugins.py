"""Extensions, losses and rules that installed packages bring, found by their entry points.

They are loaded at first use, not at import: the packages import the engine themselves.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from curvature_engine.errors import EngineError, first_line
from curvature_engine.extensions import EXTENSIONS, Accumulator, Extension, Merger
from curvature_engine.extensions.base import Columns, Kind, Merging
from curvature_engine.losses import LOSSES, LossKind
from curvature_engine.options import Options, complete_options
from curvature_engine.rules import RULES

EXTENSION_GROUP = "curvature_engine.extensions"
LOSS_GROUP = "curvature_engine.losses"
RULE_GROUP = "curvature_engine.rules"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = ("loss", "manifest")
"""Names of files that stand beside the results."""


@cache
def load_plugins() -> dict[tuple[str, str], str]:
    """Register what installed packages bring, once; every later call returns the same.

    Returns:
        (Group, name) of an extension or loss → the package that brings it, with its version.

    Raises:
        EngineError: `internal_error`, naming the entry point that is broken or clashes with another.
    """
    found = [(point, _load(point)) for group in (EXTENSION_GROUP, LOSS_GROUP, RULE_GROUP) for point in _points(group)]
    brought: dict[str, dict[str, str]] = {group: {} for group in (EXTENSION_GROUP, LOSS_GROUP)}
    for point, value in found:
        if point.group != RULE_GROUP:
            name = value.name if isinstance(value, Extension) else point.name
            _check_new(point, name, brought[point.group])
            brought[point.group][name] = _package(point)
    for point, value in found:  # only when all of them are in order
        if point.group == EXTENSION_GROUP:
            EXTENSIONS[value.name] = value
        elif point.group == LOSS_GROUP:
            LOSSES[point.name] = value
        else:
            RULES[point.name] = (*RULES.get(point.name, ()), value)
    return {(group, name): package for group, names in brought.items() for name, package in names.items()}


def rule_packages() -> list[str]:
    """The packages that bring rules, with their versions: they take part in every number."""
    return sorted({_package(point) for point in _points(RULE_GROUP)})


def _points(group: str) -> Iterator[EntryPoint]:
    """A group's entry points in an order that does not depend on where packages lie."""
    yield from sorted(entry_points(group=group), key=lambda point: (_package(point), point.name, point.value))


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _load(point: EntryPoint) -> Any:
    try:
        value = point.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _broken(point, f"cannot be imported: {reason}", "repair or uninstall the package") from error
    _CHECKS[point.group](point, value)
    return value


def _check_extension(point: EntryPoint, value: Any) -> None:
    if not isinstance(value, Extension):
        raise _broken(
            point,
            f"is {type(value).__name__}, not a curvature_engine.Extension",
            "let the entry point name an Extension, as in docs/extending.md",
        )
    fields = {
        "kind": (value.kind, get_args(Kind)),
        "columns": (value.columns, get_args(Columns)),
        "merging": (value.merging, get_args(Merging)),
        "sample_axis": (value.sample_axis, (0, 1)),
    }
    for field, (given, known) in fields.items():
        if given not in known:
            raise _broken(point, f"has {field}={given!r}", f"choose one of {', '.join(map(str, known))}")
    if value.degree is not None and not isinstance(value.degree, int | float):
        raise _broken(point, f"has degree={value.degree!r}", "give a number, e.g. 1 for what is linear in the loss")
    if value.merger is not None and not (isinstance(value.merger, type) and issubclass(value.merger, Merger)):
        raise _broken(point, "has a merger that is none", "give a subclass of curvature_engine.Merger")
    if not isinstance(value.accumulator, type) or not issubclass(value.accumulator, Accumulator):
        raise _broken(point, "has no accumulator", "give it a subclass of curvature_engine.Accumulator")
    if value.columns == "sampled" and "mc_samples" not in value.options:
        raise _broken(point, "takes sampled columns without an option mc_samples", "declare the option")
    _check_options(point, value.options)
    try:
        value.draws_when()
    except Exception as error:
        raise _broken(point, f"fails to adapt to its options: {first_line(error)}", "correct adapt") from error


def _check_loss(point: EntryPoint, value: Any) -> None:
    if not isinstance(value, LossKind):
        raise _broken(
            point,
            f"is {type(value).__name__}, not a curvature_engine.LossKind",
            "let the entry point name a LossKind, as in docs/extending.md",
        )
    _check_options(point, value.options)


def _check_rule(point: EntryPoint, value: Any) -> None:
    if not callable(value):
        raise _broken(point, f"is {type(value).__name__}, not a function", "let the entry point name a matcher")


def _check_options(point: EntryPoint, options: Options) -> None:
    """Options are published as JSON schemas, and each has a default that fits."""
    try:
        json.dumps(dict(options), allow_nan=False)
        defaults = {name: schema["default"] for name, schema in options.items()}
        complete_options(point.name, options, defaults, point.name)
    except EngineError as error:
        raise _broken(point, f"has options whose defaults do not fit: {error.message}", "correct them") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _broken(
            point,
            f"has options that are no JSON schemas with defaults: {first_line(error)}",
            'declare each as {"type": …, "default": …}',
        ) from error


_CHECKS: dict[str, Callable[[EntryPoint, Any], None]] = {
    EXTENSION_GROUP: _check_extension,
    LOSS_GROUP: _check_loss,
    RULE_GROUP: _check_rule,
}


def _check_new(point: EntryPoint, name: Any, brought: dict[str, str]) -> None:
    """Whether a name is one, and nobody else's."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise _broken(
            point,
            f"is named {name!r}",
            f"use at most 64 letters, digits, _, . and -, and none of {', '.join(_RESERVED)}",
        )
    registry: Any = EXTENSIONS if point.group == EXTENSION_GROUP else LOSSES
    owner = brought.get(name) or ("the engine itself" if name in registry else None)
    if owner is not None:
        raise _broken(point, f"is named {name!r}, as is one of {owner}", "rename it, or uninstall one of the packages")


def _broken(point: EntryPoint, reason: str, remedy: str) -> EngineError:
    return EngineError(
        "internal_error",
        f"the plug-in {point.name!r} ({point.value}) of {_package(point)}, in group {point.group}, {reason}",
        param=point.name,
        remedy=remedy,
    )
