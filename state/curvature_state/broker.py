"""The bell: a Celery task that carries a job's id and nothing else.

No result backend, JSON only, early acknowledgement (our own leases say who runs what: with late acknowledgement the
Redis transport redelivers a running task after its visibility timeout), prefetch one.
"""

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis import RedisError

from curvature_protocol.names import QUEUE, RUN_JOB_TASK
from curvature_state.settings import StateSettings


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
        broker_transport_options={"socket_connect_timeout": 2, "socket_timeout": 30, "max_retries": 1},
        task_publish_retry=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return app


def ring(app: Celery, job_id: str) -> bool:
    """Tell the workers of a job; False if the broker does not answer (the reconciler rings again)."""
    arguments: list[Any] = [job_id]
    try:
        app.send_task(RUN_JOB_TASK, arguments, queue=QUEUE)  # type: ignore[no-untyped-call]
    except (OperationalError, RedisError, OSError):
        return False
    return True
