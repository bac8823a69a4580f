"""The background task that makes the bell expendable: it rings again, and takes jobs from silent workers.

Less often, it removes what was stored and is named by nothing.
"""

import asyncio
import logging
import time

from redis import RedisError

from curvature_protocol.names import bell_queue
from curvature_service.resources import Resources
from curvature_service.threads import run_to_its_end
from curvature_state import broker, events
from curvature_state.reconciling import find_waiting, take_back_expired
from curvature_state.tidying import tidy
from curvature_state.uploads import KEPT_SECONDS, remove_stale_uploads

logger = logging.getLogger("curvature.service")

_ABANDONED_SECONDS = float(KEPT_SECONDS)
_SWEEP_EVERY = 300
_LONG_SWEEP_EVERY = 20 * _SWEEP_EVERY
"""The results are many, and all are looked at."""


async def run_reconciler(resources: Resources) -> None:
    """Reconcile for ever; a failing round is logged and the next one tries again."""
    round_number = 0
    while True:
        try:
            await run_to_its_end(reconcile_once, resources)
            if round_number % _SWEEP_EVERY == 0:
                await run_to_its_end(remove_abandoned_uploads, resources)
            if round_number % _LONG_SWEEP_EVERY == 0:
                await run_to_its_end(remove_leftover_results, resources)
        except Exception:  # the database may be away for a while
            logger.exception("reconciling failed")
        round_number += 1
        await asyncio.sleep(resources.settings.reconcile_seconds)


def reconcile_once(resources: Resources) -> None:
    """One round."""
    for ending in take_back_expired(resources.database, resources.settings.max_attempts):
        job = ending.job
        logger.warning("job %s: its worker fell silent in attempt %d; now %s", job.id, job.attempt, job.status)
        events.publish_all(resources.redis, (job, *ending.others))
    for waiting in find_waiting(resources.database):
        queue = bell_queue(gpu=waiting.gpu, tag=waiting.tag)
        try:
            # While one waits to be heard, workers are busy, or about to hear it.
            if broker.count_bells(resources.redis, queue) == 0:
                broker.ring(resources.celery, waiting.job_id, queue)
        except RedisError:  # a broker that does not answer hears no bell either
            return


def remove_abandoned_uploads(resources: Resources) -> None:
    """Uploads that nobody goes on with, and what processes that did not live to finish one left in the store."""
    removed = remove_stale_uploads(resources.database, resources.objects, time.time() - _ABANDONED_SECONDS)
    if removed:
        logger.info("%d uploads that nobody went on with were removed", removed)


def remove_leftover_results(resources: Resources) -> None:
    """Files of attempts that came to nothing, whose workers did not live to remove them, and the like."""
    for line in tidy(resources.database, resources.objects).lines:
        logger.info("removed %d %s, %d bytes: %s", line.count, line.kind, line.size_bytes, line.why)
