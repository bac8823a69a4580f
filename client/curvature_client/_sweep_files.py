"""A sweep written down in a YAML file, as `curvature sweep` reads it."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvature_client._errors import APIStatusError, refusal
from curvature_client._extensions import BATCH_OPTIONS
from curvature_client._payloads import existing_file
from curvature_client._sweep_submission import COORDINATES, FIELDS

_BESIDE = ("grid", "rows", "metadata", "webhook", "format")
"""What a file may hold beside the fields that all rows share."""
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_EXAMPLE = "see docs/sweeps.md for an example"


def read_sweep_file(path: Path) -> dict[str, Any]:
    """The arguments of `Client.sweep`; paths count from the file's folder.

    Raises:
        UnprocessableError: it is no such file; the message says where in it.
    """
    content = _load(existing_file(path, "request"))
    if not isinstance(content, Mapping):
        raise _wrong(path, "a sweep is a mapping of fields, with grid or rows")
    for name in content:
        if name not in (*_BESIDE, *FIELDS):
            close = difflib.get_close_matches(str(name), [*_BESIDE, *FIELDS], 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise _wrong(path, f"there is no field {name!r}{hint}", f"its fields: {', '.join([*_BESIDE, *FIELDS])}")
    folder = path.parent
    found = {name: _with_paths(name, value, folder) for name, value in content.items() if name not in ("grid", "rows")}
    if "grid" in content:
        found["grid"] = _grid(path, content["grid"])
    if "rows" in content:
        found["rows"] = _rows(path, content["rows"])
    return found


def _load(path: Path) -> Any:
    # Here: other commands need not wait for its import.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(path)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise _wrong(path, f"{where}{error.problem or error.context}", "write it as YAML") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it is no YAML ({str(error).splitlines()[0]})") from None


def _grid(path: Path, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise _wrong(path, f"grid maps fields to lists of values; it is {_kind(given)}")
    return {field: _axis(path, field, values) for field, values in given.items()}


def _axis(path: Path, field: str, values: Any) -> Any:
    if isinstance(values, str) and (ends := _RANGE.fullmatch(values)):
        return range(int(ends[1]), int(ends[2]) + 1)
    if isinstance(values, Mapping):
        return {name: _with_paths(field, value, path.parent) for name, value in values.items()}
    if isinstance(values, list):
        return [_with_paths(field, value, path.parent) for value in values]
    raise _wrong(path, f"grid.{field} is {_kind(values)}; a list, a mapping of names or a range (0..9) is expected")


def _rows(path: Path, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(row, Mapping) for row in given):
        raise _wrong(path, "rows are a list, each of them a mapping of fields")
    return [
        {name: value if name == COORDINATES else _with_paths(name, value, path.parent) for name, value in row.items()}
        for row in given
    ]


def _with_paths(field: str, value: Any, folder: Path) -> Any:
    """A value whose paths count from `folder`."""
    if field in ("model", "batch"):
        if isinstance(value, list):  # a data set
            return [_with_paths(field, part, folder) for part in value]
        return folder / value if isinstance(value, str) else value
    if field == "loss" and isinstance(value, str) and ("." in value or os.sep in value):
        return folder / value
    if field == "extensions":
        return [_extension(item, folder) for item in value] if isinstance(value, list) else _extension(value, folder)
    return value


def _extension(item: Any, folder: Path) -> Any:
    options = item.get("options") if isinstance(item, Mapping) else None
    if not isinstance(options, Mapping):
        return item
    paths = {name: folder / options[name] for name in BATCH_OPTIONS if isinstance(options.get(name), str)}
    return {**item, "options": {**options, **paths}}


def _kind(value: Any) -> str:
    return "empty" if value is None else f"{value!r:.60}"


def _wrong(path: Path, message: str, remedy: str = _EXAMPLE) -> APIStatusError:
    return refusal("invalid_request", f"{path}: {message}", param="file", remedy=remedy)
