"""Options of extensions and losses: declared as JSON schemas with defaults, completed and checked in one place."""

from collections.abc import Mapping
from typing import Any

from curvature_engine.errors import EngineError

Options = Mapping[str, Mapping[str, Any]]
"""Option name → JSON schema with a default: an `enum`, a `boolean`, an `integer` with its bounds, or an `array`."""


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
    complete = {name: given.get(name, schema["default"]) for name, schema in options.items()}
    for option, value in complete.items():
        _check(owner, option, value, options[option], where)
    return complete


def _check(owner: str, option: str, value: Any, schema: Mapping[str, Any], where: str) -> None:
    if not _fits(value, schema):
        default = "the default" if schema["default"] is None else repr(schema["default"])
        raise EngineError(
            "invalid_option",
            f"{owner}'s {option} must be {_expected(schema)}; got {value!r:.200}",
            param=f"{where}.{option}",
            remedy=f"leave it out for {default}",
        )


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if value is None:
        return "null" in kinds
    if "boolean" in kinds:
        return isinstance(value, bool)
    if "array" in kinds:
        whole = isinstance(value, list | tuple) and len(value) >= schema.get("minItems", 0)
        return whole and all(_fits(item, schema["items"]) for item in value)
    least, most = schema.get("minimum"), schema.get("maximum")
    fits = isinstance(value, int) and not isinstance(value, bool)
    return fits and (least is None or value >= least) and (most is None or value <= most)


def _expected(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    if schema["type"] == "boolean":
        return "true or false"
    if "array" in schema["type"]:
        some = "a list of at least one" if schema.get("minItems") else "a list, each"
        return f"{some} {_expected(schema['items']).removeprefix('a ')}"
    bounds = [f"{word} {schema[key]}" for word, key in (("from", "minimum"), ("to", "maximum")) if key in schema]
    return " ".join(["a whole number", *bounds])
