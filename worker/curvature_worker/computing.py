"""Handing an order to the tenant's child, and hearing what became of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvature_state.turns import ClaimedJob
from curvature_worker.cache import place
from curvature_worker.channel import ChannelClosed
from curvature_worker.contact import Contact
from curvature_worker.errors import JobRefused
from curvature_worker.launcher import Confined
from curvature_worker.testimony import refusal_of
from curvature_worker.tools import Tools

_STAINED = frozenset({"internal_error", "out_of_memory"})
"""Errors after which a child is not used again: its device context may be broken, its memory in pieces."""
_WHO = "the model's process"


def compute(
    tools: Tools,
    contact: Contact,
    job: ClaimedJob,
    order: dict[str, Any],
    files: Mapping[str, Path],
    model: Path | None = None,
) -> tuple[dict[str, Any], Confined]:
    """Have an order carried out; the reply, and the child, whose outbox holds the files.

    Args:
        tools: the worker's.
        contact: the attempt's.
        job: whose order it is.
        order: what to do.
        files: name in the child's inbox → file.
        model: the model's file, where the order names one.

    Raises:
        JobRefused: as the child or its death says.
    """
    child = _hand_over(tools, contact, job, order, files, model)
    try:
        reply = contact.listen(child, {"done", "error"}, _WHO, job.request.get("timeout_seconds"))
    except BaseException:  # it is dead, or still at work on what nobody wants
        tools.pool.discard(job.tenant)
        raise
    finally:
        for name in files:
            (child.inbox / name).unlink(missing_ok=True)
    contact.lap("child")
    if reply["event"] == "done":
        return reply, child
    refusal = refusal_of(reply)
    if refusal.code in _STAINED:
        tools.pool.discard(job.tenant)
    else:
        child.empty_outbox()
    raise refusal


def _hand_over(
    tools: Tools,
    contact: Contact,
    job: ClaimedJob,
    order: dict[str, Any],
    files: Mapping[str, Path],
    model: Path | None,
) -> Confined:
    """Give the tenant's child its files and its order; a child that died while idle is replaced."""
    for _ in range(2):
        child = tools.pool.acquire(job.tenant, contact.check)
        if model is not None:
            tools.pool.place_model(job.tenant, order["model"], model)
        for name, path in files.items():
            place(path, child.inbox / name)
        try:
            contact.send(child, order)
        except ChannelClosed:
            tools.pool.discard(job.tenant)
            continue
        contact.lap("hand_over")
        return child
    raise JobRefused("worker_crashed", f"{_WHO} ended before it took the job", remedy="submit the job again")
