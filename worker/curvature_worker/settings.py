"""Settings of a worker process."""

import re
import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from curvature_protocol.requests import TAG_PATTERN
from curvature_state import StateSettings

_LONGEST_NAME = 255


class WorkerSettings(StateSettings):
    """Read from `CURVATURE_<NAME>`; command-line options win."""

    worker_name: str = Field(default_factory=socket.gethostname)
    """What operators call it; several workers may share a name."""
    tags: Annotated[tuple[str, ...], NoDecode] = ()
    """What a job may require of its worker; separated by commas."""
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    memory_limit_bytes: int | None = Field(default=None, ge=2**30)
    """Address space of the child; by default most of the machine's memory on the CPU, and no limit on CUDA."""
    budget_bytes: int | None = Field(default=None, ge=1)
    """What one analysis may take beside model and batch; by default half of what the child may take, or of the card."""
    scratch_dir: Path = Field(default_factory=lambda: Path(tempfile.gettempdir()) / "curvature-worker")
    cache_bytes: int = Field(default=20 * 2**30, ge=0)
    require_isolation: bool = False
    renew_seconds: float = Field(default=3.0, gt=0)
    """How often a lease is renewed; more often where it is short."""
    poll_seconds: float = Field(default=0.25, gt=0)
    start_seconds: float = Field(default=120.0, gt=0)
    """How long a child may take to import torch and reach its device."""
    children_kept: int = Field(default=4, ge=1)
    programs_kept: int = Field(default=8, ge=1)
    """Models that a child keeps loaded,"""
    programs_bytes: int = Field(default=4 * 2**30, ge=0)
    """as long as their files together are no larger than this."""
    log_level: str = "INFO"

    @property
    def name(self) -> str:
        """What operators call this worker."""
        return self.worker_name

    @field_validator("worker_name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable() or name.isspace():
            raise ValueError(f"a worker's name has 1 to {_LONGEST_NAME} printable characters; got {name[:300]!r}")
        return name

    @field_validator("tags", mode="before")
    @classmethod
    def _are_tags(cls, tags: Any) -> tuple[str, ...]:
        given = tags.split(",") if isinstance(tags, str) else tags
        found = tuple(dict.fromkeys(tag.strip() for tag in given if tag.strip()))
        for tag in found:
            if not re.fullmatch(TAG_PATTERN, tag):
                raise ValueError(
                    "a tag is made of up to 64 letters, digits, '_', '.' and '-', and begins with one of the first "
                    f"two; got {tag!r}"
                )
        return found

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"a device is cpu, cuda or cuda:N; got {device!r}")
        return device

    @field_validator("log_level")
    @classmethod
    def _is_a_level(cls, level: str) -> str:
        if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"a log level is DEBUG, INFO, WARNING or ERROR; got {level!r}")
        return level.upper()
