"""The bell: a Celery task that carries a job's id and nothing else.

No result backend, JSON only, early acknowledgement (our own leases say who runs what: with late acknowledgement the
Redis transport redelivers a running task after its visibility timeout), prefetch one.
"""

from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state.settings import StateSettings

_STEPS = range(10)
_SEPARATOR = ":"
DEFAULT_PRIORITY = 5


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
            # One list per priority, read in this order.
            "priority_steps": list(_STEPS),
            "sep": _SEPARATOR,
        },
        task_publish_retry=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return app


def ring(app: Celery, job_id: str, priority: int = DEFAULT_PRIORITY) -> bool:
    """Tell the workers of a job; False if the broker does not answer (the reconciler rings again).

    Args:
        app: from `celery_app`.
        job_id: the job.
        priority: 0 (heard last) to 9 (heard first).
    """
    arguments: list[Any] = [job_id]
    step = _STEPS[-1] - priority  # on Redis, the lowest step is heard first
    try:
        app.send_task(RUN_JOB_TASK, arguments, queue=QUEUE, priority=step)  # type: ignore[no-untyped-call]
    except (OperationalError, redis.RedisError, OSError):
        return False
    return True


def count_bells(connection: "redis.Redis") -> int:
    """How many bells wait to be heard.

    Raises:
        redis.RedisError: if the broker does not answer.
    """
    with connection.pipeline(transaction=False) as pipe:
        for step in _STEPS:
            pipe.llen(QUEUE if step == 0 else f"{QUEUE}{_SEPARATOR}{step}")
        return sum(int(length) for length in pipe.execute())
