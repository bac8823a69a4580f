"""What the endpoints work with: opened when the application starts, closed when it stops."""

import asyncio
from typing import Annotated, cast

import redis
import redis.asyncio
from celery import Celery
from fastapi import Depends, Request

from curvature_service.settings import ServiceSettings
from curvature_state import Database, ObjectStore
from curvature_state.broker import celery_app
from curvature_state.s3 import Bucket


class Resources:
    """Database, object store, Redis, bell."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.objects = ObjectStore(settings.storage_url, settings.storage_public_endpoint or None)
        self.direct: Bucket | None = None if settings.direct_transfers == "off" else self.objects.bucket
        """The store as clients may use it themselves."""
        # Longer than any blocking read of ours; a Redis that hangs counts as away.
        url = settings.redis_url
        self.redis = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=3)
        self.async_redis = redis.asyncio.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=3)
        self.celery: Celery = celery_app(settings)
        self.background: set[asyncio.Task[None]] = set()
        """Work that outlives the request that began it."""

    async def close(self) -> None:
        """Close all connections."""
        for task in self.background:
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.async_redis.aclose()
        self.redis.close()
        self.celery.close()  # type: ignore[no-untyped-call]
        self.database.close()


def get_resources(request: Request) -> Resources:
    """The application's resources (a dependency)."""
    return cast("Resources", request.app.state.resources)


ResourcesDependency = Annotated[Resources, Depends(get_resources)]
