"""From a sweep's request to its rows: which fields each has, and where in the request they stand."""

import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from curvature_protocol.requests import JobRequest
from curvature_protocol.sweeps import MOST_ROWS, SweepItem, SweepRequest, SweepValue
from curvature_service.errors import ApiError

FIELDS = tuple(name for name in JobRequest.model_fields if name != "webhook")
"""What a row may have. A message per row is not what a sweep is for: its webhook tells of all."""
MOST_AXES = 64
REQUIRED = tuple(name for name, field in JobRequest.model_fields.items() if field.is_required())


@dataclass(frozen=True)
class ExpandedRow:
    """One row of a sweep.

    Attributes:
        fields: those of its job's request that the sweep gives.
        origins: field → where it stands in the sweep's request, e.g. `grid.loss.2`.
    """

    fields: Mapping[str, JsonValue]
    origins: Mapping[str, str]
    coordinates: Mapping[str, JsonValue]


def axes_of(request: SweepRequest) -> tuple[str, ...]:
    """Names of the rows' coordinates, in order of their first appearance.

    Raises:
        ApiError: `invalid_request`, for so many that they are none.
    """
    if request.grid is not None:
        return tuple(request.grid)
    found = tuple(dict.fromkeys(name for item in request.rows or () for name in _coordinates(item)))
    if len(found) > MOST_AXES:
        raise ApiError(
            "invalid_request",
            f"the rows of a sweep may have {MOST_AXES} different coordinates; they have {len(found)}",
            param="rows",
            remedy="name coordinates alike in all rows",
        )
    return found


def expand(request: SweepRequest) -> Iterator[ExpandedRow]:
    """The rows in order.

    Raises:
        ApiError: `invalid_request`, for a field that no request has, one that a row lacks, or too many rows.
    """
    _check_names(request.base, "base")
    if request.grid is not None:
        yield from _of_grid(request.base, request.grid)
    else:
        yield from _of_items(request.base, request.rows or ())


def _of_grid(base: Mapping[str, JsonValue], grid: Mapping[str, Sequence[SweepValue]]) -> Iterator[ExpandedRow]:
    _check_names(grid, "grid")
    total = math.prod(len(values) for values in grid.values())
    if total > MOST_ROWS:
        lengths = " × ".join(str(len(values)) for values in grid.values())
        raise ApiError(
            "invalid_request",
            f"a sweep may have {MOST_ROWS} rows; the grid has {lengths} = {total}",
            param="grid",
            remedy="make several sweeps of it",
        )
    for axis, values in grid.items():
        for place, value in enumerate(values):
            _check_names(value.fields, f"grid.{axis}.{place}.fields")
    shared = {name: f"base.{name}" for name in base}
    brought = (set.intersection(*(set(value.fields) for value in values)) for values in grid.values())
    _check_complete({*base, *grid}.union(*brought), "grid")
    choices = [[_choice(axis, place, value) for place, value in enumerate(values)] for axis, values in grid.items()]
    for chosen in itertools.product(*choices):
        fields, origins = dict(base), dict(shared)
        for choice in chosen:
            fields.update(choice.fields)
            origins.update(choice.origins)
        yield ExpandedRow(fields, origins, {name: c.coordinates[name] for c in chosen for name in c.coordinates})


def _choice(axis: str, place: int, value: SweepValue) -> ExpandedRow:
    """What one value on an axis adds to its rows."""
    where = f"grid.{axis}.{place}"
    origins = {name: f"{where}.fields.{name}" for name in value.fields}
    name = _plain_name(value.value, place) if value.name is None else value.name
    return ExpandedRow({**value.fields, axis: value.value}, {**origins, axis: where}, {axis: name})


def _of_items(base: Mapping[str, JsonValue], items: Sequence[SweepItem]) -> Iterator[ExpandedRow]:
    shared = {name: f"base.{name}" for name in base}
    for row, item in enumerate(items):
        where = f"rows.{row}"
        _check_names(item.fields, where)
        _check_complete({*base, *item.fields}, where)
        origins = {**shared, **{name: f"{where}.{name}" for name in item.fields}}
        yield ExpandedRow({**base, **item.fields}, origins, _coordinates(item))


def _coordinates(item: SweepItem) -> Mapping[str, JsonValue]:
    if item.coordinates:
        return item.coordinates
    names = {field: _plain_name(value, None) for field, value in item.fields.items()}
    return {field: name for field, name in names.items() if name is not None}


def _plain_name(value: JsonValue, place: int | None) -> JsonValue:
    """A value's coordinate where nobody named it."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        for telling in ("sha256", "name"):
            if isinstance(found := value.get(telling), str):
                return found
    return place


def _check_names(given: Iterable[str], where: str) -> None:
    for name in given:
        if name in FIELDS:
            continue
        if name == "webhook":
            detail = "a sweep has one webhook for all of its jobs"
            remedy = "give it beside base and rows, not as a field of theirs"
        else:
            close = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            detail, remedy = f"a job's request has no field {name[:64]!r}{hint}", f"its fields: {', '.join(FIELDS)}"
        raise ApiError("invalid_request", detail, param=f"{where}.{name[:64]}", remedy=remedy)


def _check_complete(given: set[str], where: str) -> None:
    for name in REQUIRED:
        if name not in given:
            raise ApiError(
                "invalid_request",
                f"neither base nor {where} has the field {name!r}, which every job needs",
                param=where,
                remedy=f"give {name} in base, if all rows share it",
            )
