"""Tenants: whose jobs are whose, and what their share of the workers is.

Between tenants, worker seconds divided by the tenant's weight are kept equal: a virtual time per tenant, as in
start-time fair queueing (Goyal, Vin & Cheng 1996). Who comes back to the queue after a while does not get the time
that it left unused.
"""

from datetime import UTC, datetime
from typing import cast

from sqlalchemy import Table, bindparam, exists, func, insert, literal_column, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from curvature_protocol.jobs import JobStatus
from curvature_state.tables import JobRow, TenantRow

DEFAULT_TENANT = "default"
"""Whom a request without a key comes from."""
QUEUED = JobRow.status == literal_column(f"'{JobStatus.QUEUED}'")
"""As the index of the queue spells it: with a parameter in its place, no database would use that index."""


class QueueFull(Exception):
    """A tenant has as many queued jobs as it may.

    Attributes:
        tenant, limit, queued, wanted: the numbers.
    """

    def __init__(self, tenant: str, limit: int, queued: int, wanted: int) -> None:
        super().__init__(f"{tenant} has {queued} queued jobs of at most {limit}; {wanted} more came")
        self.tenant, self.limit, self.queued, self.wanted = tenant, limit, queued, wanted


def enter_queue(session: Session, tenant: str, count: int) -> None:
    """Take notice of jobs that a tenant is about to queue.

    Raises:
        QueueFull: there would be too many.
    """
    row, _ = ensure_tenant(session, tenant)
    if row.max_queued is not None:
        # Locked (PostgreSQL), so that two submissions at once do not share the last free place.
        session.execute(select(TenantRow.name).where(TenantRow.name == tenant).with_for_update())
        bounded = select(JobRow.id).where(JobRow.tenant == tenant, QUEUED).limit(row.max_queued + 1)
        queued = session.scalar(select(func.count()).select_from(bounded.subquery())) or 0
        if queued + count > row.max_queued:
            raise QueueFull(tenant, row.max_queued, queued, count)
    if count and not session.scalar(select(exists().where(JobRow.tenant == tenant, QUEUED))):
        _catch_up(session, tenant)


def ensure_tenant(session: Session, tenant: str) -> tuple[TenantRow, bool]:
    """The tenant's row, made now if there is none; and whether it was made."""
    row = session.get(TenantRow, tenant)
    if row is not None:
        return row, False
    values = {"name": tenant, "weight": 1.0, "virtual_seconds": 0.0, "created_at": datetime.now(UTC)}
    made = True
    try:
        with session.begin_nested():
            session.execute(insert(TenantRow), [values])
    except IntegrityError:  # another process was faster
        made = False
    return session.get_one(TenantRow, tenant), made


def _catch_up(session: Session, tenant: str) -> None:
    """Lift the virtual time of a tenant that was idle to that of those who wait."""
    other = aliased(TenantRow)
    waits = exists().where(JobRow.tenant == other.name, QUEUED)
    least = select(func.min(other.virtual_seconds)).where(other.name != tenant, waits)
    lowest = session.scalar(least)
    if lowest is not None:
        session.execute(
            update(TenantRow)
            .where(TenantRow.name == tenant, TenantRow.virtual_seconds < lowest)
            .values(virtual_seconds=lowest)
            .execution_options(synchronize_session=False)
        )


_CHARGE = (
    update(cast("Table", TenantRow.__table__))
    .where(TenantRow.name == bindparam("of_tenant"))
    .values(virtual_seconds=TenantRow.virtual_seconds + bindparam("seconds") / TenantRow.weight)
)


def charge(session: Session, tenant: str, seconds: float) -> None:
    """Note the time for which a worker worked for a tenant."""
    session.connection().execute(_CHARGE, {"of_tenant": tenant, "seconds": max(0.0, seconds)})
