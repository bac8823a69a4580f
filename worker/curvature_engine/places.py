"""Where a node of a TorchScript graph came from, for messages."""

import re
from typing import Any


def place_of(node: Any) -> str:
    """The line of the model's code that a node came from, in one line.

    A script knows its source; a trace knows the Python stack, innermost first, and its generated code.
    """
    original, _, serialized = str(node.sourceRange()).partition("Serialized ")
    where, code = _marked_line(original)
    if not where:
        first = original.strip().partition("\n")[0]
        if match := _STACK_LINE.fullmatch(first):
            where = f"{match['file'].rsplit('/', 1)[-1]}, line {match['line']}, in {match['function']}"
        else:
            where = _marked_line(serialized)[0]
    code = code or _marked_line(serialized)[1]
    return ": ".join(part for part in (where, code) if part) or f"node {node.kind()}"


_STACK_LINE = re.compile(r"(?P<file>.+)\((?P<line>\d+)\): (?P<function>\S+)")


def _marked_line(text: str) -> tuple[str, str]:
    """(file and line, code) of the line that TorchScript underlined."""
    where = code = ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("File "):
            file, _, rest = line.strip().removeprefix("File ").replace('"', "").partition(", ")
            where = f"{file.rsplit('/', 1)[-1]}, {rest}"
        if "<--- HERE" in line and number > 0:
            code = lines[number - 1].strip()
    return where, code
