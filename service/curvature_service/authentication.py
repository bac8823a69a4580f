"""Whom a request comes from: its API key's tenant."""

import hashlib
import hmac
import logging
import time
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from curvature_service.errors import DATABASE_AWAY, ApiError
from curvature_service.resources import ResourcesDependency
from curvature_state import Database
from curvature_state.keys import find_key, public_beginning, touch_key
from curvature_state.tenants import DEFAULT_TENANT

logger = logging.getLogger("curvature.service")

KNOWN_SECONDS = 4.0
"""How long a key counts that was looked up, so that not every request asks the database. A key that
is revoked is good for as long."""

_MOST_KNOWN = 10_000

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="api_key",
    description="A key made by `curvature admin keys create`, or the server's CURVATURE_API_KEY, if it has one",
)


class KnownKeys:
    """Keys looked up a moment ago, by their digests. Used by one thread, that of the event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tenants: dict[bytes, tuple[str, float]] = {}

    async def tenant_of(self, key: str) -> str:
        """The tenant of a key.

        Raises:
            ApiError: `unauthenticated` if there is no such key, or it was revoked.
        """
        digest = hashlib.sha256(key.encode()).digest()
        tenant, until = self._tenants.get(digest, ("", 0.0))
        now = time.monotonic()
        if now < until:
            return tenant
        tenant = await run_in_threadpool(_look_up, self._database, key)
        if len(self._tenants) >= _MOST_KNOWN:
            self._tenants.clear()
        self._tenants[digest] = (tenant, now + KNOWN_SECONDS)
        return tenant


async def authenticate(
    request: Request,
    resources: ResourcesDependency,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> str:
    """The request's tenant; a wrong key is never as good as none."""
    settings = resources.settings
    key = "" if given is None else given.credentials
    if settings.api_key and hmac.compare_digest(key.encode(), settings.api_key.encode()):
        return DEFAULT_TENANT
    if key:
        known = cast("KnownKeys", request.app.state.keys)
        return await known.tenant_of(key)
    if settings.api_key or settings.require_key:
        raise _refusal("this server needs an API key; none came")
    return DEFAULT_TENANT


TenantDependency = Annotated[str, Depends(authenticate)]
"""Whom the request comes from."""


def _look_up(database: Database, key: str) -> str:
    found = find_key(database, key)
    if found is None:
        shown = public_beginning(key)
        raise _refusal(f"the API key{f' {shown}…' if shown else ''} is not known to this server")
    if found.revoked_at is not None:
        raise _refusal(f"the API key {public_beginning(key)}… was revoked")
    try:
        touch_key(database, found)
    except DATABASE_AWAY as error:  # it answered a moment ago; the request need not fail for this
        logger.warning("the use of the API key %s could not be noted: %s", found.id, error)
    return found.tenant


def _refusal(detail: str) -> ApiError:
    return ApiError(
        "unauthenticated",
        detail,
        remedy="set CURVATURE_API_KEY, or pass api_key= to Client; the operator makes keys with `curvature admin keys "
        "create`",
        headers={"WWW-Authenticate": "Bearer"},
    )
