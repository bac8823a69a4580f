"""What an operator sets of a tenant, and sees of it."""

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from curvature_state.database import Database
from curvature_state.tables import ApiKeyRow, JobRow, TenantRow
from curvature_state.tenants import QUEUED, ensure_tenant
from curvature_state.turns import HELD

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MOST_JOBS = 2**31 - 1
_LARGEST_WEIGHT = 1e6


class _Unchanged(Enum):
    UNCHANGED = "unchanged"


UNCHANGED: Final = _Unchanged.UNCHANGED
"""A setting that stays as it is (None takes a limit away)."""


@dataclass(frozen=True)
class Tenant:
    """A tenant's settings, and what it has at the moment."""

    name: str
    weight: float
    max_queued: int | None
    max_running: int | None
    queued: int
    running: int
    keys: int
    """That were not revoked."""


def check_tenant_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: saying what a name is.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a tenant's name is made of up to 64 letters, digits, '_', '.' and '-', and begins with one of the first "
            f"two; got {name!r}"
        )
    return name


def set_tenant(
    database: Database,
    name: str,
    *,
    weight: float | _Unchanged = UNCHANGED,
    max_queued: int | _Unchanged | None = UNCHANGED,
    max_running: int | _Unchanged | None = UNCHANGED,
) -> bool:
    """Change a tenant's settings, of a new one, too; returns whether it is new.

    Raises:
        ValueError: saying what a name, a weight or a limit is.
    """
    values = {
        column: value
        for column, value in {"weight": weight, "max_queued": max_queued, "max_running": max_running}.items()
        if value is not UNCHANGED
    }
    _check_settings(values)
    with database.write() as session:
        new = ensure_tenant(session, check_tenant_name(name))[1]
        if values:
            session.execute(update(TenantRow).where(TenantRow.name == name).values(**values))
    return new


def _check_settings(values: dict[str, Any]) -> None:
    for column, value in values.items():
        if column == "weight":
            if not (math.isfinite(value) and 0 < value <= _LARGEST_WEIGHT):
                raise ValueError(f"a weight is greater than 0 and at most {_LARGEST_WEIGHT:,.0f}; got {value}")
        elif value is not None and not 0 <= value <= _MOST_JOBS:
            raise ValueError(f"{column} is a whole number from 0 to {_MOST_JOBS:,}, or none; got {value}")


def list_tenants(database: Database) -> list[Tenant]:
    """All tenants, by name."""
    with database.read() as session:
        rows = session.scalars(select(TenantRow).order_by(TenantRow.name)).all()
        queued = _counts(session, JobRow.tenant, QUEUED)
        running = _counts(session, JobRow.tenant, JobRow.status.in_(HELD))
        keys = _counts(session, ApiKeyRow.tenant, ApiKeyRow.revoked_at.is_(None))
    return [
        Tenant(
            row.name,
            row.weight,
            row.max_queued,
            row.max_running,
            queued.get(row.name, 0),
            running.get(row.name, 0),
            keys.get(row.name, 0),
        )
        for row in rows
    ]


def _counts(session: Session, tenant: InstrumentedAttribute[str], condition: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(tenant, func.count()).where(condition).group_by(tenant))
    return {row[0]: row[1] for row in rows}
