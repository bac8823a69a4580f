"""The API key."""

import hmac
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from curvature_service.errors import ApiError
from curvature_service.resources import ResourcesDependency
from curvature_state.tenants import DEFAULT_TENANT

_bearer = HTTPBearer(
    auto_error=False, scheme_name="api_key", description="The server's CURVATURE_API_KEY, if it has one"
)


async def authenticate(
    resources: ResourcesDependency, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> str:
    """The request's tenant; requests without the configured key are refused."""
    expected = resources.settings.api_key
    if not expected:
        return DEFAULT_TENANT
    key = "" if given is None else given.credentials
    if not hmac.compare_digest(key.encode(), expected.encode()):
        raise ApiError(
            "unauthenticated",
            "this server needs an API key; none or a wrong one came",
            remedy="set CURVATURE_API_KEY, or pass api_key= to Client",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return DEFAULT_TENANT


TenantDependency = Annotated[str, Depends(authenticate)]
"""Whom the request comes from."""
