"""Waking workers for jobs that were queued."""

from collections.abc import Mapping

from curvature_protocol.names import bell_queue
from curvature_service.resources import Resources
from curvature_state import broker
from curvature_state.workers import list_workers

Kind = tuple[bool, str | None]
"""(whether a GPU is required, the tag that is required)"""


def ring(resources: Resources, wanted: Mapping[Kind, tuple[str, int]]) -> None:
    """Wake as many workers as there is work for.

    Args:
        resources: the broker.
        wanted: kind → (one of the jobs that require it, how many there are).
    """
    many = any(count > 1 for _, count in wanted.values())
    workers = max(1, len(list_workers(resources.database))) if many else 1
    for (gpu, tag), (job_id, count) in wanted.items():
        for _ in range(min(count, workers)):
            broker.ring_unless_enough(resources.celery, resources.redis, job_id, bell_queue(gpu=gpu, tag=tag))
