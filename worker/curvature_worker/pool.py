"""Warm children, one tenant each, and a blank spare that has imported everything already."""

import logging
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from curvature_worker.channel import ChannelClosed
from curvature_worker.errors import WorkerUnfit
from curvature_worker.launcher import Confined, launch
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_START_SECONDS = 120.0


class ChildPool:
    """Hands out children by tenant; the least recently used one goes when there are too many.

    Attributes:
        greeting: what the first child said of itself (isolation, catalogue, device).
    """

    def __init__(self, settings: WorkerSettings, scratch: Path) -> None:
        self._settings, self._scratch = settings, scratch
        self._children: OrderedDict[str, Confined] = OrderedDict()
        self._spare = self._start()
        self._spare_ready = False
        self.greeting: dict[str, Any] = {}

    def open(self) -> None:
        """Wait for the first child.

        Raises:
            WorkerUnfit: if it does not come up as it should.
        """
        self.greeting = self._await_ready(self._spare)
        self._spare_ready = True
        isolation = self.greeting["isolation"]
        if self._settings.require_isolation and not {"landlock", "seccomp"} <= set(isolation.split("+")):
            raise WorkerUnfit(
                f"isolation is required, but only {isolation} is in force: Linux 5.13 with Landlock and libseccomp "
                "are needed; install libseccomp2, or start without --require-isolation"
            )

    def acquire(self, tenant: str) -> Confined:
        """The tenant's child, alive and ready."""
        child = self._children.get(tenant)
        if child is not None and child.alive:
            self._children.move_to_end(tenant)
            return child
        if child is not None:
            self.discard(tenant)
        child = self._spare
        if not self._spare_ready:
            self._await_ready(child)
        self._children[tenant] = child
        self._spare, self._spare_ready = self._start(), False
        while len(self._children) > self._settings.children_kept:
            self.discard(next(iter(self._children)))
        return child

    def discard(self, tenant: str) -> None:
        """End a tenant's child; the next job gets the spare."""
        child = self._children.pop(tenant, None)
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End all children."""
        for tenant in list(self._children):
            self.discard(tenant)
        self._spare.kill()

    def _start(self) -> Confined:
        limit = self._settings.memory_limit_bytes
        return launch(
            "curvature_worker.child",
            scratch=self._scratch,
            options={"device": self._settings.device, "threads": self._settings.threads},
            limits={} if limit is None else {"AS": limit},
            threads=self._settings.threads,
        )

    def _await_ready(self, child: Confined) -> dict[str, Any]:
        deadline = time.monotonic() + _START_SECONDS
        try:
            message = child.channel.receive(deadline - time.monotonic())
        except ChannelClosed as error:
            raise WorkerUnfit(f"the computing process {child.obituary()} while starting; see the log above") from error
        if message is None:
            child.kill()
            raise WorkerUnfit(f"the computing process did not start within {_START_SECONDS:.0f} s")
        if message.get("event") != "ready":
            raise WorkerUnfit(f"{message.get('message')}; {message.get('remedy')}")
        return message
