"""Options of extensions and losses: declared as JSON schemas with defaults, completed and checked in one place."""

from collections.abc import Mapping
from typing import Any

from curvature_engine.errors import EngineError

Options = Mapping[str, Mapping[str, Any]]
"""Option name → JSON schema with a default: an `enum`, or an `integer` with its bounds."""


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
    if "enum" in schema:
        fits, expected = value in schema["enum"], f"one of {', '.join(map(repr, schema['enum']))}"
    else:
        least, most = schema.get("minimum"), schema.get("maximum")
        fits = isinstance(value, int) and not isinstance(value, bool)
        fits = fits and (least is None or value >= least) and (most is None or value <= most)
        bounds = [f"from {least}"] * (least is not None) + [f"to {most}"] * (most is not None)
        expected = " ".join(["a whole number", *bounds])
    if not fits:
        raise EngineError(
            "invalid_option",
            f"{owner}'s {option} must be {expected}; got {value!r}",
            param=f"{where}.{option}",
            remedy=f"leave it out for {schema['default']!r}",
        )
