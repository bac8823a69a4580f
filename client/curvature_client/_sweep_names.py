"""Coordinates of a sweep's rows: what a person calls the values that tell rows apart."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvature_client._extensions import Extension, list_of

_PLAIN = (str, int, float, bool)


def name_all(field: str, values: Sequence[Any]) -> list[Any]:
    """A name for each of the distinct values that a field has in a sweep.

    A number or a word is its own name; of a file it is the file's name, of a function or a loss module its own, of a
    list of extensions their labels; what has none, or one that another has too, is known by its place.
    """
    if field in ("model", "batch"):
        schemes = (_file_name, _path)
    elif field in ("loss", "extensions", "parameters"):
        schemes = (_word_for, _word_for)
    else:
        return [plain(value) if isinstance(plain(value), _PLAIN) else place for place, value in enumerate(values)]
    for scheme in schemes:
        found = [scheme(value) for value in values]
        names = [place if name is None else name for place, name in enumerate(found)]
        if len(set(names)) == len(names):
            return names
    return list(range(len(values)))


def plain(value: Any) -> Any:
    """A number of NumPy's or torch's as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _file_name(value: Any) -> str | None:
    return Path(value).name if isinstance(value, str | os.PathLike) else None


def _path(value: Any) -> str | None:
    return os.fspath(value) if isinstance(value, str | os.PathLike) else None


def _word_for(value: Any) -> str | None:
    if value is None:
        return "default"
    if isinstance(value, str):
        return Path(value).name if os.sep in value else value
    if isinstance(value, Extension) or (isinstance(value, type) and issubclass(value, Extension)):
        return value.label or value.name
    if isinstance(value, Mapping):
        found = value.get("label") or value.get("name") or getattr(value.get("function"), "__name__", None)
        return found if isinstance(found, str) else None
    if isinstance(value, os.PathLike):
        return Path(value).name
    if isinstance(value, Sequence):
        words = [_word_for(item) for item in list_of(value)]
        return "+".join(word or "?" for word in words)
    return getattr(value, "__name__", None) or type(value).__name__
