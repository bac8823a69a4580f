"""The background task that keeps to the limits."""

import asyncio
import logging

from fastapi.concurrency import run_in_threadpool

from curvature_service.resources import Resources
from curvature_service.retention.service import policy_of
from curvature_state.retention import Report, collect

logger = logging.getLogger("curvature.service")

COLLECT_SECONDS = 180.0


async def run_collector(resources: Resources) -> None:
    """Collect for ever, beside the reconciler: a long collection keeps nobody's bell waiting."""
    while True:
        await asyncio.sleep(COLLECT_SECONDS)
        try:
            await run_in_threadpool(collect_once, resources)
        except Exception:  # the database or the store may be away for a while
            logger.exception("what is too old or too much could not be removed")


def collect_once(resources: Resources) -> Report:
    """One collection; without limits, it finishes what deletions began."""
    report = collect(resources.database, resources.objects, policy_of(resources.settings))
    for line in report.lines:
        logger.info("removed %d %s, %d bytes: %s", line.count, line.kind, line.size_bytes, line.why)
    return report
