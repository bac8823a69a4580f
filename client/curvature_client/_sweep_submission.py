"""A sweep on its way to the server: a grid or rows as the user gave them, and the request that they become."""

import difflib
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvature_client._errors import refusal
from curvature_client._requirements import read_webhook
from curvature_client._submission import checked_metadata
from curvature_client._sweep_fields import Identity, ModelOnBatch, SentFields, identity, placed
from curvature_client._sweep_names import name_all, plain
from curvature_client._transport import Transport
from curvature_protocol.names import INPUTS, TARGETS
from curvature_protocol.requests import JobRequest
from curvature_protocol.sweeps import Sweep as SweepView

FIELDS = tuple(name for name in JobRequest.model_fields if name not in ("webhook", "warnings"))
REQUIRED = ("model", "batch", "extensions")
COORDINATES = "coordinates"
_ACCEPT_SECONDS = 120.0
"""How long a server may take for a hundred thousand rows, beside the usual time of a request."""


@dataclass(frozen=True)
class Axis:
    """An axis of a grid: its values, and what each is called."""

    values: Sequence[Any]
    names: Sequence[Any]


@dataclass(frozen=True)
class Row:
    """Fields of one row, and what tells it from the others.

    Attributes:
        own: those that are not from the base.
        origins: field → where it stands in what the user gave.
    """

    fields: Mapping[str, Any]
    own: frozenset[str]
    origins: Mapping[str, str]
    coordinates: Mapping[str, Any]


@dataclass(frozen=True)
class SweepArguments:
    """The arguments of `Client.sweep`; exactly one of `grid` and `rows` is given."""

    grid: Mapping[str, Any] | None
    rows: Iterable[Mapping[str, Any]] | None
    base: Mapping[str, Any]
    metadata: Mapping[str, str] | None = None
    webhook: str | Mapping[str, Any] | None = None
    format: str = "auto"


def submit_sweep(transport: Transport, arguments: SweepArguments, progress: bool | None) -> SweepView:
    """Convert and upload what the rows need, and submit them.

    Raises:
        CurvatureError: whatever is wrong with a value; `param` names its place. The sweep does not exist then.
    """
    if (arguments.grid is None) == (arguments.rows is None):
        raise refusal(
            "invalid_request",
            f"a sweep has either a grid or rows; {'neither' if arguments.grid is None else 'both'} came",
            param="grid",
            remedy='e.g. client.sweep(grid={"seed": range(10)}, model=model, batch=batch, extensions=["diag_ggn_mc"])',
        )
    base = {name: value for name, value in arguments.base.items() if value is not None}
    _check_names(base, "")
    body: dict[str, Any] = {
        "metadata": checked_metadata(arguments.metadata),
        "webhook": read_webhook(arguments.webhook),
    }
    with tempfile.TemporaryDirectory(prefix="curvature-") as folder:
        sent = SentFields(transport, Path(folder), progress, arguments.format)
        if arguments.grid is None:
            body |= _of_rows(sent, base, _read_rows(base, arguments.rows or ()))
        else:
            axes = _read_grid(base, arguments.grid)
            # With `eval` on an axis, a model has two files: which one a row has, a grid cannot say.
            body |= _of_rows(sent, base, list(_expanded(base, axes))) if "eval" in axes else _of_grid(sent, base, axes)
    response = transport.request(
        "POST",
        "/v1/sweeps",
        json=body,
        headers={"Idempotency-Key": uuid.uuid4().hex},
        timeout=transport.timeout_beyond(_ACCEPT_SECONDS),
    )
    return transport.parse(response, SweepView)


def _read_grid(base: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Axis]:
    if not isinstance(grid, Mapping) or not grid:
        raise _no_axis(f"grid maps fields to their values; got {grid!r:.100}", "grid")
    _check_names(grid, "grid.")
    _check_complete({*base, *grid}, "grid")
    return {field: _read_axis(field, values) for field, values in grid.items()}


def _read_axis(field: str, given: Any) -> Axis:
    where = f"grid.{field}"
    if isinstance(given, Mapping):
        if field == "batch" and set(given) == {INPUTS, TARGETS}:
            raise _no_axis(f"{where} is one batch, not several", where)
        names = [name if isinstance(name, str | int | float) else str(name) for name in given]
        axis = Axis(list(given.values()), names)
    elif not isinstance(given, Iterable) or isinstance(given, str | bytes | os.PathLike) or hasattr(given, "forward"):
        raise _no_axis(f"{where} is one value (of type {type(given).__name__}), not several", where)
    else:
        values = list(given)
        axis = Axis(values, name_all(field, values))
    if not axis.values:
        raise _no_axis(f"{where} has no values", where)
    return axis


def _no_axis(message: str, param: str) -> Exception:
    remedy = 'give a list, or a dictionary of names and values, e.g. grid={"model": {"small": a, "large": b}}'
    return refusal("invalid_request", message, param=param, remedy=remedy)


def _expanded(base: Mapping[str, Any], axes: Mapping[str, Axis]) -> Iterator[Row]:
    """Every combination, the last axis fastest."""
    for places in itertools.product(*(range(len(axis.values)) for axis in axes.values())):
        chosen = dict(zip(axes, places, strict=True))
        own = {name: axes[name].values[place] for name, place in chosen.items()}
        origins = {name: f"grid.{name}.{place}" for name, place in chosen.items()}
        coordinates = {name: axes[name].names[place] for name, place in chosen.items()}
        yield Row({**base, **own}, frozenset(own), {**{name: name for name in base}, **origins}, coordinates)


def _of_grid(sent: SentFields, base: Mapping[str, Any], axes: Mapping[str, Axis]) -> dict[str, Any]:
    """The request, which the server expands."""
    together = {name: axis for name, axis in axes.items() if name in ("model", "batch")}
    sent.send_models_and_batches(ModelOnBatch(row.fields, row.origins) for row in _expanded(base, together))
    reductions = axes["reduction"].values if "reduction" in axes else [base.get("reduction")]

    def wire(field: str, value: Any, origin: str) -> dict[str, Any]:
        if field != "loss":
            return _wire(sent, {**base, field: value}, [field], {field: origin})
        with placed(origin, field):
            found = [sent.loss(value, reduction) for reduction in reductions]
        return found[0] if "reduction" not in axes else {"loss": found[0]["loss"]}

    grid: dict[str, list[dict[str, Any]]] = {}
    for field, axis in axes.items():
        grid[field] = []
        for place, (value, name) in enumerate(zip(axis.values, axis.names, strict=True)):
            fields = dict(wire(field, value, f"grid.{field}.{place}"))
            grid[field].append({"value": fields.pop(field), "name": name, "fields": fields})
    shared: dict[str, Any] = {}
    for field in base:
        if field not in axes:
            shared |= wire(field, base[field], field)
    return {"base": shared, "grid": grid}


def _read_rows(base: Mapping[str, Any], given: Iterable[Mapping[str, Any]]) -> list[Row]:
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise _no_rows(f"rows are several; got {type(given).__name__}", "rows")
    rows = list(given)
    for place, row in enumerate(rows):
        where = f"rows.{place}"
        if not isinstance(row, Mapping):
            raise _no_rows(f"{where} is of type {type(row).__name__}; a row is a dictionary of fields", where)
        if not isinstance(row.get(COORDINATES, {}), Mapping):
            raise _no_rows(f"{where}.{COORDINATES} is no dictionary", f"{where}.{COORDINATES}")
        _check_names([name for name in row if name != COORDINATES], f"{where}.")
        _check_complete({*base, *row}, where)
    if not rows:
        raise _no_rows("there are no rows", "rows")
    names = _names_in(rows)
    return [_read_row(base, row, place, names) for place, row in enumerate(rows)]


def _no_rows(message: str, param: str) -> Exception:
    remedy = 'give a list of dictionaries, e.g. rows=[{"model": a, "seed": 0}, {"model": b, "seed": 1}]'
    return refusal("invalid_request", message, param=param, remedy=remedy)


def _names_in(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Identity], Any]:
    """(field, value) → what it is called."""
    distinct: dict[str, dict[Identity, Any]] = {}
    for row in rows:
        for field, value in row.items():
            distinct.setdefault(field, {}).setdefault(identity(value), value)
    return {
        (field, key): name
        for field, values in distinct.items()
        for key, name in zip(values, name_all(field, list(values.values())), strict=True)
    }


def _read_row(
    base: Mapping[str, Any], given: Mapping[str, Any], place: int, names: Mapping[tuple[str, Identity], Any]
) -> Row:
    own = {field: value for field, value in given.items() if field != COORDINATES}
    coordinates = given.get(COORDINATES) or {field: names[field, identity(value)] for field, value in own.items()}
    origins = {**{name: name for name in base}, **{name: f"rows.{place}.{name}" for name in own}}
    return Row({**base, **own}, frozenset(own), origins, coordinates)


def _of_rows(sent: SentFields, base: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    sent.send_models_and_batches(ModelOnBatch(row.fields, row.origins) for row in rows)
    shared = [name for name in base if name not in ("model", "batch")]
    items = []
    for row in rows:
        # What of the base depends on a field of the row's own, the row has, too.
        names = {"model", "batch", *row.own}
        names |= {"loss", "reduction"} & row.fields.keys() if names & {"loss", "reduction"} else set()
        fields = _wire(sent, row.fields, sorted(names), row.origins)
        items.append({"fields": fields, COORDINATES: {str(n): plain(v) for n, v in row.coordinates.items()}})
    return {"base": _wire(sent, base, shared, {name: name for name in base}), "rows": items}


def _wire(
    sent: SentFields, fields: Mapping[str, Any], names: Iterable[str], origins: Mapping[str, str]
) -> dict[str, Any]:
    """Some of the fields as the server reads them."""
    found: dict[str, Any] = {}
    for name in names:
        with placed(origins[name], name):
            if name == "model":
                found |= sent.model(fields[name], bool(fields.get("eval", True)))
            elif name == "batch":
                found[name] = sent.batch(fields[name])
            elif name == "loss":
                found |= sent.loss(fields[name], fields.get("reduction"))
            elif name == "reduction":
                found[name] = sent.loss(None, fields[name])[name]
            else:
                found |= sent.other(name, fields[name])
    return found


def _check_names(given: Iterable[str], where: str) -> None:
    for name in given:
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise refusal(
                "invalid_request",
                f"a sweep's rows have no field {name!r}{hint}",
                param=f"{where}{name}",
                remedy=f"their fields: {', '.join(FIELDS)}",
            )


def _check_complete(given: set[str], where: str) -> None:
    for name in REQUIRED:
        if name not in given:
            raise refusal(
                "invalid_request",
                f"{where} has no {name}, and there is none for all rows",
                param=where,
                remedy=f"pass {name}=… for all rows, or give it in the grid or in every row",
            )
