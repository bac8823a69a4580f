"""A sweep as a table of pandas, which need not be installed."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from curvature_client._errors import CurvatureError
from curvature_protocol.sweeps import SweepRowView

if TYPE_CHECKING:
    import pandas

COLUMNS = ("status", "job", "loss_value", "queued_seconds", "running_seconds", "error")
"""Beside the coordinates. An axis may well be called "loss": the loss's value is called otherwise."""


def frame_of(axes: Sequence[str], read: Callable[[], Iterable[SweepRowView]]) -> "pandas.DataFrame":
    """The table of rows, numbered as they are.

    Args:
        axes: names of the coordinates; one that another column has is written `coordinates.…`.
        read: asks the server for the rows.

    Raises:
        CurvatureError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise CurvatureError(
            "to_dataframe() needs pandas, which is not installed",
            code="not_installed",
            remedy="pip install pandas; sweep.rows has the same without it",
        ) from None
    rows = list(read())
    index = pandas.Index([row.row for row in rows], name="row", dtype="int64")
    columns = [*map(column_of, axes), *COLUMNS]
    return pandas.DataFrame.from_records([record_of(axes, row) for row in rows], index=index, columns=columns)


def column_of(axis: str) -> str:
    """The column of an axis."""
    return f"coordinates.{axis}" if axis in COLUMNS else axis


def record_of(axes: Sequence[str], row: SweepRowView) -> dict[str, Any]:
    """One row of the table: column → value."""
    return {**{column_of(axis): row.coordinates.get(axis) for axis in axes}, **_columns_of(row)}


def _columns_of(row: SweepRowView) -> dict[str, Any]:
    result, error = row.result, row.error
    values = (
        row.status.value,
        row.job_id,
        None if result is None else result.loss,
        _seconds(row.created_at, row.started_at),
        _seconds(row.started_at, row.finished_at),
        None if error is None else f"{error.code}: {error.detail}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else (end - begin).total_seconds()
