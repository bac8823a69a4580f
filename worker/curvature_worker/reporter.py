"""Telling a job's followers how it goes."""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from queue import Empty, SimpleQueue

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
_LAST_PHASE = "storing"
_CLOSE_SECONDS = 5.0
_MOST_AT_ONCE = 200


class Reporter:
    """Publishes to jobs' streams, from a thread of its own: neither a job nor the next one waits for Redis.

    While Redis is away, nothing is told: followers see the state in the database.
    """

    def __init__(self, redis_url: str) -> None:
        # One fresh connection is tried (the server may have been restarted), and none waited for.
        self._redis = redis.Redis.from_url(
            redis_url, socket_connect_timeout=1, socket_timeout=1, retry=Retry(NoBackoff(), 1)
        )
        self._silent_until = self._told_at = self._begun_at = 0.0
        self._events: SimpleQueue[JobEvent | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True, name="reporter")
        self._thread.start()

    def state(self, job: ClaimedJob, status: JobStatus) -> None:
        """Publish a change of state."""
        self._begun_at = time.monotonic()
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
        if progress.phase == _LAST_PHASE and now - self._begun_at < _PROGRESS_SECONDS:
            return  # the end comes with it
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
        """Send what is left, and close the connection."""
        self._events.put(None)
        self._thread.join(_CLOSE_SECONDS)
        self._redis.close()

    def _publish(self, event: JobEvent) -> None:
        self._events.put(event)

    def _send(self) -> None:
        """Send what there is, all at once: jobs may be over faster than a single message is sent."""
        while (event := self._events.get()) is not None:
            events, closing = [event], False
            with suppress(Empty):
                while len(events) < _MOST_AT_ONCE and not closing:
                    more = self._events.get_nowait()
                    closing = more is None
                    events += [] if more is None else [more]
            begun = time.monotonic()
            if begun >= self._silent_until:
                publish(self._redis, *events)
                if time.monotonic() - begun > _SLOW_SECONDS:
                    self._silent_until = time.monotonic() + _SILENCE_SECONDS
            if closing:
                return
