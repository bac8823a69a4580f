"""Where the records, the bytes and the broker are. The environment is read here and nowhere else."""

from urllib.parse import parse_qs, urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from curvature_state.endings import MAX_ATTEMPTS


class StateSettings(BaseSettings):
    """Settings of everything that touches shared state; each is read from `CURVATURE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="CURVATURE_", extra="ignore")

    database_url: str = "sqlite:///curvature.db"
    """SQLAlchemy URL: `sqlite:///path` or `postgresql+psycopg://…`."""
    storage_url: str = "file:///tmp/curvature-objects"
    """`file:///folder`, `memory:///`, or `s3://bucket/prefix`."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """`redis://[:password@]host:port/db` or `unix:///path?db=0`."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """How long a worker may be silent before its job is taken from it."""

    max_attempts: int = Field(default=MAX_ATTEMPTS, ge=1)
    """How often a job is tried whose worker or process dies, or for which a part of the service is away."""

    @property
    def broker_url(self) -> str:
        """The Redis URL as Celery's transport spells it."""
        parts = urlsplit(self.redis_url)
        if parts.scheme != "unix":
            return self.redis_url
        database = parse_qs(parts.query).get("db", ["0"])[0]
        return f"redis+socket://{parts.path}?virtual_host={database}"
