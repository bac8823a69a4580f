"""Options of extensions and losses: declared as JSON schemas with defaults, completed and checked in one place."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from curvature_engine.errors import EngineError

Options = Mapping[str, Mapping[str, Any]]
"""Option name → JSON schema with a default.

An `enum`; or a `type` or several of them: numbers with `minimum`, `exclusiveMinimum`, `maximum`; arrays with `items`
and `minItems`. An object stands for a batch: its schema is that of a reference to one, its value here a pair (inputs,
targets).
"""


def options_schema(options: Options) -> dict[str, Any]:
    """JSON schema of an object that holds some of the options."""
    properties = {name: dict(schema) for name, schema in options.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def complete_options(owner: str, options: Options, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given options, defaults filled in.

    Args:
        owner: whose options they are, for messages.
        options: the known ones.
        given: by name.
        where: what precedes an option's name in an error's `param`.

    Raises:
        EngineError: `invalid_option`, naming the known ones.
    """
    for option in given:
        if option not in options:
            raise EngineError(
                "invalid_option",
                f"{owner} has no option {option!r}",
                param=f"{where}.{option}",
                remedy=f"it takes: {', '.join(options) or 'none'}",
            )
    for option, value in given.items():  # defaults fit as they are declared
        _check(owner, option, value, options[option], where)
    return {name: given.get(name, schema["default"]) for name, schema in options.items()}


def _check(owner: str, option: str, value: Any, schema: Mapping[str, Any], where: str) -> None:
    if not _fits(value, schema):
        default = "the default" if schema["default"] is None else repr(schema["default"])
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
        raise EngineError(
            "invalid_option",
            f"{owner}'s {option} must be {_describe(schema)}; got {shown}",
            param=f"{where}.{option}",
            remedy=f"leave it out for {default}",
        )


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema:
        return any(type(value) is type(known) and value == known for known in schema["enum"])
    if "type" not in schema:
        return True
    kind = next((k for k in _types(schema) if _KINDS[k][1](value)), None)
    if kind in ("integer", "number"):
        return (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        )
    if kind == "array":
        return len(value) >= schema.get("minItems", 0) and all(_fits(item, schema["items"]) for item in value)
    return kind is not None


def _describe(schema: Mapping[str, Any]) -> str:
    """What fits, in words, e.g. "a whole number from 1" or "a list, each item a number from 0, or None"."""
    if not schema:
        return "anything"
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if key in schema
    ]
    words = []
    for kind in _types(schema):
        word = _KINDS[kind][0]
        if kind in ("integer", "number"):
            word = " ".join([word, *bounds])
        elif kind == "array":
            least = " of at least one item" if schema.get("minItems") else ""
            word = f"{word}{least}, each item {_describe(schema['items'])},"
        words.append(word)
    return " or ".join(words).replace(",,", ",").rstrip(",")


def _types(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema["type"]
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_batch(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


_SHOWN_CHARACTERS = 64
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "null": ("None", lambda value: value is None),
    "boolean": ("True or False", lambda value: isinstance(value, bool)),
    "integer": ("a whole number", _is_integer),
    "number": ("a number", _is_number),
    "string": ("a string", lambda value: isinstance(value, str)),
    "object": ("a batch (inputs, targets)", _is_batch),
    "array": ("a list", lambda value: isinstance(value, list | tuple)),
}
"""JSON schema type → (in words, whether a value is one)."""
