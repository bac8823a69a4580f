"""The background task that sends what is due, several messages at a time."""

import asyncio
import logging

from curvature_service.resources import Resources
from curvature_service.threads import run_to_its_end
from curvature_service.webhooks.addresses import read_policy
from curvature_service.webhooks.messages import SubjectGone, SubjectNotOver, compose
from curvature_service.webhooks.sender import Outcome, Sender
from curvature_state.database import Database
from curvature_state.webhooks import Delivery, put_back, record_delivered, record_failure, take_due

logger = logging.getLogger("curvature.service")

_MOST_AT_ONCE = 32
_SHORT_PAUSE_SECONDS = 0.2
"""While many are due: the next are found together, since finding them reads all that are due (15 ms for 10,000)."""


async def run_deliverer(resources: Resources) -> None:
    """Send for ever; what cannot be recorded comes due again."""
    settings = resources.settings
    sender = Sender(
        read_policy(settings.webhook_allow_private, settings.webhook_allowed_hosts),
        settings.webhook_secret,
        timeout_seconds=settings.webhook_timeout_seconds,
    )
    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            # No more than can be sent at once: what waits here, no other process could send.
            running |= await _start_due(resources.database, sender, _MOST_AT_ONCE - len(running))
            pause = settings.webhook_seconds
            if len(running) >= _MOST_AT_ONCE:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                pause = min(pause, _SHORT_PAUSE_SECONDS)
            await asyncio.sleep(pause)
            running = {task for task in running if not task.done()}
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _start_due(database: Database, sender: Sender, limit: int) -> set[asyncio.Task[None]]:
    try:
        due = await run_to_its_end(take_due, database, limit)
    except Exception:  # the database may be away for a while
        logger.exception("looking for due webhooks failed")
        return set()
    return {asyncio.create_task(deliver(database, sender, delivery)) for delivery in due}


async def deliver(database: Database, sender: Sender, delivery: Delivery) -> None:
    """One try, and its record. Nobody waits for it: what fails is logged."""
    try:
        try:
            body = await run_to_its_end(compose, database, delivery)
        except SubjectNotOver:
            await run_to_its_end(put_back, database, delivery)
            return
        except SubjectGone:
            outcome = Outcome(f"the {delivery.subject} was deleted", gone=True)
        else:
            outcome = await sender.send(delivery, body)
        await run_to_its_end(_record, database, delivery, outcome)
    except Exception as error:
        logger.exception("webhook %s of %s %s failed", delivery.id, delivery.subject, delivery.subject_id)
        await _record_unforeseen(database, delivery, error)


def _record(database: Database, delivery: Delivery, outcome: Outcome) -> None:
    """What came of a try. The log names no URL: its path is often a secret of the receiver's."""
    named = (delivery.id, delivery.subject, delivery.subject_id)
    if outcome.problem is None:
        record_delivered(database, delivery)
        logger.info("webhook %s of %s %s: delivered in try %d", *named, delivery.tries)
        return
    last = record_failure(
        database, delivery, outcome.problem, pause_seconds=outcome.pause_seconds, give_up=outcome.gone
    )
    rest = "given up" if last else "to be tried again"
    logger.warning("webhook %s of %s %s: try %d: %s; %s", *named, delivery.tries, outcome.problem, rest)


async def _record_unforeseen(database: Database, delivery: Delivery, error: Exception) -> None:
    """A message that we cannot handle must come to an end, too."""
    try:
        await run_to_its_end(record_failure, database, delivery, f"unforeseen: {type(error).__name__}")
    except Exception:  # then it comes due again when this hold is over
        logger.exception("webhook %s cannot be recorded", delivery.id)
