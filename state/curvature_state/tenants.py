"""Tenants: whom jobs belong to."""

DEFAULT_TENANT = "default"
"""Whom a request without a key comes from."""
