"""The bell: a Celery task that carries a job's id and nothing else. Whoever hears it works until the queue is empty.

No result backend, JSON only, early acknowledgement (our own leases say who runs what: with late acknowledgement the
Redis transport redelivers a running task after its visibility timeout), prefetch one.
"""

import logging
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state.settings import StateSettings

logger = logging.getLogger("curvature.state")

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


class BrokerUnfit(Exception):
    """The broker may lose what it was given; the message says why and what to do."""


def check_broker(url: str) -> None:
    """At start: see that the broker evicts nothing. One that is away, or does not say, is no reason not to start.

    Raises:
        BrokerUnfit: it may evict bells.
    """
    connection = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=3)
    try:
        require_noeviction(connection)
    except redis.ResponseError as error:
        logger.warning("the broker does not say what it does when its memory is full (%s); it must not evict", error)
    except redis.RedisError as error:
        logger.warning("the broker does not answer: %s", error)
    finally:
        connection.close()


def require_noeviction(connection: "redis.Redis") -> None:
    """See that a broker with limited memory refuses what is too much, and does not throw away what it has.

    Raises:
        BrokerUnfit: it throws away.
        redis.ResponseError: it does not let us ask.
        redis.RedisError: it does not answer.
    """
    found = {_text(name): _text(value) for name, value in connection.config_get("maxmemory*").items()}
    policy = found.get("maxmemory-policy", "noeviction")
    if int(found.get("maxmemory", "0")) > 0 and policy != "noeviction":
        raise BrokerUnfit(
            f"the broker's maxmemory-policy is {policy}: when its memory is full it would throw bells and events away; "
            "set it to noeviction (redis-cli CONFIG SET maxmemory-policy noeviction, and in its configuration)"
        )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
