"""Settings of a worker process."""

import tempfile
from pathlib import Path

from pydantic import Field

from curvature_state import StateSettings


class WorkerSettings(StateSettings):
    """Read from `CURVATURE_<NAME>`; command-line options win."""

    device: str = "cpu"
    threads: int | None = None
    memory_limit_bytes: int | None = None
    """Address space of the child; none by default (CUDA reserves far more than it uses)."""
    scratch_dir: Path = Field(default_factory=lambda: Path(tempfile.gettempdir()) / "curvature-worker")
    cache_bytes: int = 20 * 2**30
    require_isolation: bool = False
    renew_seconds: float = 3.0
    poll_seconds: float = 0.25
    children_kept: int = 4
    log_level: str = "INFO"
