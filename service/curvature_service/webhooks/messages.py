"""What is sent: the body, and the headers of the Standard Webhooks specification (1.0)."""

import base64
import hashlib
import hmac
import json
from datetime import datetime
from importlib.metadata import version
from typing import Any

from curvature_protocol.jobs import FINAL
from curvature_protocol.requests import signing_key
from curvature_state import Database
from curvature_state.jobs import get_job
from curvature_state.sweeps import find_end, get_sweep
from curvature_state.webhooks import Delivery

_UNTOLD = {"request", "result"}


class SubjectGone(Exception):
    """The job or sweep was deleted."""


class SubjectNotOver(Exception):
    """The job or sweep was taken up again."""


def compose(database: Database, delivery: Delivery) -> bytes:
    """The body: the same in every try, since what is over does not change.

    Raises:
        SubjectGone, SubjectNotOver: there is nothing to tell (yet).
    """
    return _compose_job(database, delivery) if delivery.subject == "job" else _compose_sweep(database, delivery)


def _compose_job(database: Database, delivery: Delivery) -> bytes:
    job = get_job(database, delivery.subject_id)
    if job is None:
        raise SubjectGone
    if job.status not in FINAL:
        raise SubjectNotOver
    return _body(f"job.{job.status}", job.finished_at or job.created_at, job.model_dump(mode="json", exclude=_UNTOLD))


def _compose_sweep(database: Database, delivery: Delivery) -> bytes:
    sweep = get_sweep(database, delivery.subject_id)
    if sweep is None:
        raise SubjectGone
    if not sweep.done:
        raise SubjectNotOver
    ended = find_end(database, delivery.subject_id) or sweep.created_at
    return _body("sweep.finished", ended, sweep.model_dump(mode="json"))


def _body(kind: str, moment: datetime, data: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "timestamp": moment.isoformat(), "data": data}, separators=(",", ":")).encode()


def headers_of(message_id: str, sent_at: datetime, body: bytes, secret: str | None) -> dict[str, str]:
    """The headers of one try; without a secret there is no signature."""
    seconds = str(int(sent_at.timestamp()))
    headers = {
        "content-type": "application/json",
        "user-agent": f"Curvature/{version('curvature')}",
        "webhook-id": message_id,
        "webhook-timestamp": seconds,
    }
    if secret:
        told = b".".join((message_id.encode(), seconds.encode(), body))
        digest = hmac.new(signing_key(secret), told, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers
