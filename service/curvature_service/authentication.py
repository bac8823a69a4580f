"""The API key."""

import hmac

from fastapi import Request

from curvature_service.errors import ApiError
from curvature_service.resources import ResourcesDependency


async def require_key(request: Request, resources: ResourcesDependency) -> None:
    """Refuse requests without the configured key."""
    expected = resources.settings.api_key
    if expected is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {expected}".encode()):
        raise ApiError(
            "unauthenticated",
            "this server needs an API key; none or a wrong one came",
            remedy="set CURVATURE_API_KEY, or pass api_key= to Client",
            headers={"WWW-Authenticate": "Bearer"},
        )
