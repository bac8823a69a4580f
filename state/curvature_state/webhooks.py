"""Messages about jobs and sweeps that are over: which are due, who sends them, and what became of it.

waiting ──► due ──► delivered
   ▲         │ └──► failed        after `MAX_TRIES`, or when there is nobody to send it to any more
   └─────────┴───── its subject was taken up again

Whoever takes a message holds it until its `next_at`, pushed ahead by compare-and-set; if a sender dies, the message
comes due again under the same id: delivery is at least once.

How a subject's end is noticed: jobs end in several places, and none of them knows of webhooks. A job with a webhook is
marked when it is written, and a partial index holds those marked jobs that are over: a round reads these alone, however
many others wait. (Joining the waiting webhooks with their jobs took 18 ms a round at 10,000 of them, on SQLite and on
PostgreSQL, and grows with their number.) Of a sweep, another partial index tells whether a job is unfinished.
"""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import CursorResult, Select, delete, func, select, text, update
from sqlalchemy.orm import Session

from curvature_protocol.requests import Webhook
from curvature_state.database import Database
from curvature_state.tables import (
    OF_SWEEP,
    TO_TELL,
    UNFINISHED_IN_SWEEP,
    JobRow,
    WebhookRow,
)

MAX_TRIES = 8
LONGEST_PAUSE_SECONDS = 24 * 3600.0
"""How much a receiver's `Retry-After` may ask for."""
HOLD_SECONDS = 120.0
"""How long a sender may take for one message, before others may think it dead."""

Subject = Literal["job", "sweep"]

_WAITING, _DUE, _DELIVERED, _FAILED = "waiting", "due", "delivered", "failed"
_FIRST_PAUSE_SECONDS = 15.0
_GROWTH = 4.0
"""Seven pauses of 15 s, 1, 4, 16 min, 1, 4 and 17 h: 23 hours in all."""
_JITTER = 0.25
_MOST_AT_ONCE = 1000
_LONGEST_ERROR = 500
_QUIET: dict[str, Any] = {"synchronize_session": False}


@dataclass(frozen=True)
class Delivery:
    """A message that its holder is to send now. `tries` counts this one; `id` is the same in all of them."""

    id: str
    tenant: str
    subject: Subject
    subject_id: str
    url: str
    tries: int
    secret: str | None = field(repr=False)


def register(session: Session, subject: Subject, subject_id: str, tenant: str, webhook: Webhook) -> None:
    """Note whom to tell when the job or sweep is over, in the transaction that writes it, after its row."""
    now = datetime.now(UTC)
    if subject == "job":
        _mark_jobs(session, [subject_id])
    row = WebhookRow(
        id=uuid.uuid4().hex,
        tenant=tenant,
        subject=subject,
        subject_id=subject_id,
        url=webhook.url,
        secret=webhook.secret,
        state=_WAITING,
        attempts=0,
        next_at=now,
        created_at=now,
    )
    session.add(row)


def without_secret(request: dict[str, Any]) -> dict[str, Any]:
    """A request as it may be stored and shown: its webhook without the secret."""
    webhook = request.get("webhook")
    if not isinstance(webhook, dict) or "secret" not in webhook:
        return request
    return {**request, "webhook": {key: value for key, value in webhook.items() if key != "secret"}}


def rearm(session: Session, subject_ids: Sequence[str]) -> None:
    """Jobs or sweeps that were over are taken up again: their next end is another message, with another id.

    One that has not been delivered yet is dropped: it would tell of an end that is none. To be called after the jobs'
    rows were changed: whoever sends locks in that order, too.
    """
    for start in range(0, len(subject_ids), _MOST_AT_ONCE):
        some = subject_ids[start : start + _MOST_AT_ONCE]
        query = select(WebhookRow).where(WebhookRow.subject_id.in_(some), WebhookRow.state != _WAITING)
        rows = session.scalars(query.order_by(WebhookRow.id).with_for_update()).all()
        for row in rows:
            row.id, row.state, row.attempts, row.last_error = uuid.uuid4().hex, _WAITING, 0, None
        if told := [row.subject_id for row in rows if row.subject == "job"]:
            _mark_jobs(session, told)


def forget(session: Session, subject_ids: Sequence[str]) -> None:
    """Jobs or sweeps are deleted: nobody is told of them any more."""
    for start in range(0, len(subject_ids), _MOST_AT_ONCE):
        some = subject_ids[start : start + _MOST_AT_ONCE]
        session.execute(delete(WebhookRow).where(WebhookRow.subject_id.in_(some)).execution_options(**_QUIET))


def take_due(database: Database, limit: int) -> list[Delivery]:
    """Messages to be sent now, at most `limit`, each held by this caller; tenants take turns."""
    if limit < 1:
        return []
    ended, swept = _finished_jobs(), _finished_sweeps()
    with database.read() as session:
        found = [session.scalar(query.limit(1)) for query in (ended, swept)]
    if found != [None, None]:
        with database.write() as session:
            _make_due(session, ended, swept)
    now = datetime.now(UTC)
    due = [WebhookRow.state == _DUE, WebhookRow.next_at <= now]
    # One tenant's thousand messages to a receiver that does not answer must not keep another's from being sent.
    place = func.row_number().over(partition_by=WebhookRow.tenant, order_by=(WebhookRow.next_at, WebhookRow.id))
    with database.read() as session:
        ids = session.scalars(select(WebhookRow.id).where(*due).order_by(place, WebhookRow.next_at).limit(limit)).all()
    if not ids:
        return []
    with database.write() as session:
        # The conditions once more: of several processes, one sends.
        held = _lock(session, select(WebhookRow.id).where(WebhookRow.id.in_(ids), *due))
        take = update(WebhookRow).where(WebhookRow.id.in_(held))
        until = now + timedelta(seconds=HOLD_SECONDS)
        take = take.values(attempts=WebhookRow.attempts + 1, next_at=until).execution_options(**_QUIET)
        rows = session.scalars(take.returning(WebhookRow)).all()
        taken = {row.id: _delivery(row) for row in rows}
    return [taken[message_id] for message_id in ids if message_id in taken]


def record_delivered(database: Database, delivery: Delivery) -> None:
    """The receiver has it, whoever else is trying still."""
    query = update(WebhookRow).where(WebhookRow.id == delivery.id)
    with database.write() as session:
        session.execute(query.values(state=_DELIVERED, last_error=None).execution_options(**_QUIET))


def record_failure(
    database: Database, delivery: Delivery, reason: str, *, pause_seconds: float = 0.0, give_up: bool = False
) -> bool:
    """A try came to nothing: another follows, unless it was the last; returns whether it was the last.

    Args:
        database: the truth.
        delivery: what was tried.
        reason: why it came to nothing.
        pause_seconds: what the receiver asked for; the next try is not made before.
        give_up: whether no other try can help.
    """
    last = give_up or delivery.tries >= MAX_TRIES
    pause = max(backoff_seconds(delivery.tries), min(pause_seconds, LONGEST_PAUSE_SECONDS))
    values: dict[str, Any] = {
        "state": _FAILED if last else _DUE,
        "last_error": reason.replace("\x00", "")[:_LONGEST_ERROR],  # PostgreSQL's text holds no NUL
        "next_at": datetime.now(UTC) + timedelta(seconds=pause),
    }
    with database.write() as session:
        session.execute(_held(delivery).values(**values).execution_options(**_QUIET))
    return last


def put_back(database: Database, delivery: Delivery) -> None:
    """The subject was taken up again before its message was sent: the message waits for the next end."""
    with database.write() as session:
        if delivery.subject == "job":
            session.execute(_marking([delivery.subject_id]))
        values: dict[str, Any] = {"id": uuid.uuid4().hex, "state": _WAITING, "attempts": 0}
        session.execute(_held(delivery).values(**values).execution_options(**_QUIET))


def backoff_seconds(tries: int) -> float:
    """How long to wait after so many tries: longer every time, and not the same for all."""
    return _FIRST_PAUSE_SECONDS * _GROWTH ** (tries - 1) * random.uniform(1 - _JITTER, 1 + _JITTER)


def _finished_jobs() -> Select[str]:
    """Jobs that are over and that a webhook waits for."""
    # In the index's order: PostgreSQL takes having a webhook and being over for independent, expects many such jobs
    # soon, and reads the whole table for them.
    return select(JobRow.id).where(text(TO_TELL)).order_by(JobRow.status)


def _finished_sweeps() -> Select[str]:
    """Webhooks that wait for a sweep without an unfinished job."""
    unfinished = select(JobRow.id).where(JobRow.sweep_id == WebhookRow.subject_id, text(UNFINISHED_IN_SWEEP))
    return select(WebhookRow.id).where(text(OF_SWEEP), WebhookRow.state == _WAITING, ~unfinished.exists())


def _make_due(session: Session, ended: Select[str], swept: Select[str]) -> None:
    """Messages about what is over are due from now on."""
    jobs = _lock(session, ended.limit(_MOST_AT_ONCE))
    unmark = update(JobRow).where(JobRow.id.in_(jobs)).values(webhook_waits=False)
    session.execute(unmark.execution_options(**_QUIET))
    sweeps = _lock(session, swept.limit(_MOST_AT_ONCE))
    of_jobs = [WebhookRow.subject == "job", WebhookRow.subject_id.in_(jobs), WebhookRow.state == _WAITING]
    for chosen in (of_jobs, [WebhookRow.id.in_(sweeps)]):
        values: dict[str, Any] = {"state": _DUE, "next_at": datetime.now(UTC)}
        session.execute(update(WebhookRow).where(*chosen).values(**values).execution_options(**_QUIET))


def _lock(session: Session, query: Select[str]) -> Sequence[str]:
    """Ids of rows that nobody else is changing at this moment (PostgreSQL; on SQLite nobody can)."""
    return session.scalars(query.with_for_update(skip_locked=True)).all()


def _mark_jobs(session: Session, job_ids: Sequence[str]) -> None:
    """A webhook waits for the end of these jobs."""
    result = session.execute(_marking(job_ids))
    assert isinstance(result, CursorResult)
    if result.rowcount != len(set(job_ids)):
        raise LookupError(f"a webhook is for a job that has a row; of {list(job_ids)[:3]}, {result.rowcount} have one")


def _marking(job_ids: Sequence[str]) -> Any:
    return update(JobRow).where(JobRow.id.in_(job_ids)).values(webhook_waits=True).execution_options(**_QUIET)


def _held(delivery: Delivery) -> Any:
    """An update of the message, as long as nobody has taken it after this holder."""
    mine = [WebhookRow.id == delivery.id, WebhookRow.state == _DUE, WebhookRow.attempts == delivery.tries]
    return update(WebhookRow).where(*mine)


def _delivery(row: WebhookRow) -> Delivery:
    subject: Subject = "job" if row.subject == "job" else "sweep"
    return Delivery(row.id, row.tenant, subject, row.subject_id, row.url, row.attempts, row.secret)
