"""The background task that makes the bell expendable: it rings again, and takes jobs from silent workers."""

import asyncio
import logging
import time

from fastapi.concurrency import run_in_threadpool

from curvature_service.artefacts.service import UPLOADS
from curvature_service.resources import Resources
from curvature_state import broker, events
from curvature_state.jobs import reconcile

logger = logging.getLogger("curvature.service")

_ABANDONED_SECONDS = 24 * 3600
_SWEEP_EVERY = 300


async def run_reconciler(resources: Resources) -> None:
    """Reconcile for ever; a failing round is logged and the next one tries again."""
    round_number = 0
    while True:
        try:
            await run_in_threadpool(_reconcile_once, resources)
            if round_number % _SWEEP_EVERY == 0:
                await run_in_threadpool(_remove_abandoned_uploads, resources)
        except Exception:  # the database may be away for a while
            logger.exception("reconciling failed")
        round_number += 1
        await asyncio.sleep(resources.settings.reconcile_seconds)


def _reconcile_once(resources: Resources) -> None:
    done = reconcile(resources.database)
    for job in done.changed:
        logger.warning("job %s: its worker fell silent in attempt %d; now %s", job.id, job.attempt, job.status)
        events.publish(resources.redis, events.state_event(job))
    for job_id in done.ring:
        broker.ring(resources.celery, job_id)


def _remove_abandoned_uploads(resources: Resources) -> None:
    """Temporary keys of uploads that this or an earlier process did not live to finish."""
    oldest = time.time() - _ABANDONED_SECONDS
    for key, changed_at in resources.objects.list(UPLOADS):
        if changed_at < oldest:
            resources.objects.delete(key)
