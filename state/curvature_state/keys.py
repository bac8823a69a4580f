"""API keys: `cv_<id>_<secret>`, shown once and known by their SHA-256 ever after."""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import or_, select, update

from curvature_state.database import Database
from curvature_state.tables import ApiKeyRow
from curvature_state.tenant_settings import check_tenant_name
from curvature_state.tenants import ensure_tenant

_FORM = re.compile(r"cv_[0-9a-f]{12}_[0-9a-f]{48}")
_LONGEST_NAME = 255
_TOUCH_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key."""

    id: str
    """Its public part."""
    tenant: str
    name: str
    created_at: datetime
    used_at: datetime | None
    """To the minute."""
    revoked_at: datetime | None


def create_key(database: Database, tenant: str, name: str) -> tuple[ApiKey, str]:
    """Make a key for a tenant, which may be new; returns its record and the key itself, which is kept nowhere.

    Raises:
        ValueError: saying what a tenant's or a key's name is.
    """
    check_tenant_name(tenant)
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a key's name has 1 to {_LONGEST_NAME} printable characters; got {name[:300]!r}")
    key_id = secrets.token_hex(6)
    key = f"cv_{key_id}_{secrets.token_hex(24)}"
    row = ApiKeyRow(id=key_id, tenant=tenant, name=name, sha256=_digest(key), created_at=datetime.now(UTC))
    with database.write() as session:
        ensure_tenant(session, tenant)
        session.add(row)
    return _view(row), key


def list_keys(database: Database, tenant: str | None = None) -> list[ApiKey]:
    """All keys, or a tenant's, oldest first."""
    query = select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id)
    if tenant is not None:
        query = query.where(ApiKeyRow.tenant == tenant)
    with database.read() as session:
        return [_view(row) for row in session.scalars(query)]


def find_key(database: Database, key: str) -> ApiKey | None:
    """The record of a key, a revoked one, too; None if there is none."""
    if not _FORM.fullmatch(key):
        return None
    with database.read() as session:
        row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.sha256 == _digest(key)))
    return None if row is None else _view(row)


def touch_key(database: Database, key: ApiKey) -> None:
    """Note that the key is used, at most once a minute."""
    now = datetime.now(UTC)
    if key.used_at is not None and key.used_at > now - _TOUCH_EVERY:
        return
    stale = or_(ApiKeyRow.used_at.is_(None), ApiKeyRow.used_at <= now - _TOUCH_EVERY)
    with database.write() as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key.id, stale).values(used_at=now))


def revoke_key(database: Database, key_id: str) -> ApiKey | None:
    """Revoke a key for good, by its id or its beginning `cv_<id>`; None if there is none. Once is enough."""
    found = key_id.removeprefix("cv_").partition("_")[0]
    with database.write() as session:
        query = update(ApiKeyRow).where(ApiKeyRow.id == found, ApiKeyRow.revoked_at.is_(None))
        session.execute(query.values(revoked_at=datetime.now(UTC)))
        row = session.get(ApiKeyRow, found)
        return None if row is None else _view(row)


def public_beginning(key: str) -> str | None:
    """The part of a key that may be told; None if it is not of our form."""
    return key.rpartition("_")[0] if _FORM.fullmatch(key) else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _view(row: ApiKeyRow) -> ApiKey:
    return ApiKey(row.id, row.tenant, row.name, row.created_at, row.used_at, row.revoked_at)
