"""The bell: a Celery task that carries a job's id and nothing else. Whoever hears it works until the queue is empty.

No result backend, JSON only, early acknowledgement (our own leases say who runs what: with late acknowledgement the
Redis transport redelivers a running task after its visibility timeout), prefetch one.
"""

from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state.settings import StateSettings

ENOUGH_BELLS = 64
"""With so many waiting in a queue, no worker sleeps that could hear another."""


def celery_app(settings: StateSettings, name: str = "curvature") -> Celery:
    """A Celery application on our broker; making it connects to nothing."""
    app = Celery(name, broker=settings.broker_url)  # type: ignore[no-untyped-call]
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_default_queue=QUEUE,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_connect_timeout": 2,
            "socket_timeout": 30,
            # A broker that is away must not hold up the request that rings: the reconciler rings again.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
        task_publish_retry=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return app


def ring(app: Celery, job_id: str, queue: str = QUEUE) -> bool:
    """Tell the workers of a job; False if the broker does not answer (the reconciler rings again).

    Args:
        app: from `celery_app`.
        job_id: the job.
        queue: whose workers can do it, from `bell_queue`.
    """
    arguments: list[Any] = [job_id]
    try:
        app.send_task(RUN_JOB_TASK, arguments, queue=queue)  # type: ignore[no-untyped-call]
    except (OperationalError, redis.RedisError, OSError):
        return False
    return True


def count_bells(connection: "redis.Redis", queue: str = QUEUE) -> int:
    """How many bells wait to be heard.

    Raises:
        redis.RedisError: if the broker does not answer.
    """
    return int(connection.llen(queue))


def ring_unless_enough(app: Celery, connection: "redis.Redis", job_id: str, queue: str = QUEUE) -> bool:
    """`ring`, unless so many bells wait that one more would wake nobody."""
    try:
        if count_bells(connection, queue) >= ENOUGH_BELLS:
            return True
    except redis.RedisError:
        return False
    return ring(app, job_id, queue)
