"""Telling a job's followers how it goes."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import Job, JobStatus, Progress
from curvature_state.events import publish, state_event
from curvature_state.turns import ClaimedJob

_SLOW_SECONDS = 0.5
_SILENCE_SECONDS = 10.0
_PROGRESS_SECONDS = 0.1


class Reporter:
    """Publishes to the job's stream. A Redis that is away must not slow the job down: progress falls silent then."""

    def __init__(self, redis_url: str) -> None:
        # One fresh connection is tried (the server may have been restarted), and none waited for.
        self._redis = redis.Redis.from_url(
            redis_url, socket_connect_timeout=1, socket_timeout=1, retry=Retry(NoBackoff(), 1)
        )
        self._silent_until = self._told_at = 0.0

    def state(self, job: ClaimedJob, status: JobStatus) -> None:
        """Publish a change of state."""
        self._publish(
            JobEvent(
                event="state",
                job_id=job.id,
                status=status,
                at=datetime.now(UTC),
                attempt=job.attempt,
                sweep=job.sweep_id,
            )
        )

    def records(self, jobs: Iterable[Job]) -> None:
        """Publish where jobs stand."""
        for job in jobs:
            self._publish(state_event(job))

    def progress(self, job: ClaimedJob, progress: Progress) -> None:
        """Publish progress, not too often."""
        now = time.monotonic()
        if now < self._silent_until or (now - self._told_at < _PROGRESS_SECONDS and progress.done < progress.total):
            return
        self._told_at = now
        self._publish(
            JobEvent(
                event="progress",
                job_id=job.id,
                status=JobStatus.RUNNING,
                at=datetime.now(UTC),
                attempt=job.attempt,
                progress=progress,
            )
        )

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def _publish(self, event: JobEvent) -> None:
        begun = time.monotonic()
        if begun < self._silent_until:
            return
        publish(self._redis, event)
        if time.monotonic() - begun > _SLOW_SECONDS:
            self._silent_until = time.monotonic() + _SILENCE_SECONDS
