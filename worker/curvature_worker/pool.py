"""Warm children, one tenant each, and a blank spare that has imported everything already."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from curvature_worker.cache import Inbox
from curvature_worker.channel import ChannelClosed
from curvature_worker.errors import WorkerUnfit
from curvature_worker.launcher import Confined, launch
from curvature_worker.memory import analysis_budget, child_memory_limit
from curvature_worker.settings import WorkerSettings

logger = logging.getLogger("curvature.worker")

_STARTS = 3


class ChildPool:
    """Hands out children by tenant; the least recently used one goes when there are too many.

    Attributes:
        greeting: what the first child said of itself (isolation, catalogue, device, memory of one analysis).
    """

    def __init__(self, settings: WorkerSettings, scratch: Path) -> None:
        self._settings, self._scratch = settings, scratch
        self._memory_limit = child_memory_limit(settings)
        self._budget_bytes = analysis_budget(settings)
        self._children: OrderedDict[str, Confined] = OrderedDict()
        self._inboxes: dict[str, Inbox] = {}
        self._spare: Confined | None = self._start()
        self.greeting: dict[str, object] = {}

    def open(self) -> None:
        """Wait for the first child.

        Raises:
            WorkerUnfit: if it does not come up as it should.
        """
        assert self._spare is not None
        self._await_ready(self._spare, _nothing)
        self.greeting = self._spare.greeting

    def acquire(self, tenant: str, check: Callable[[], None]) -> Confined:
        """The tenant's child, alive and ready.

        Args:
            tenant: whose.
            check: called while waiting; raises what is to end the wait.

        Raises:
            WorkerUnfit: if no child can be started any more.
        """
        child = self._children.get(tenant)
        if child is not None and child.alive:
            self._children.move_to_end(tenant)
            return child
        self.discard(tenant)
        child = self._take_spare(check)
        self._children[tenant] = child
        self._inboxes[tenant] = Inbox(child.inbox, self._settings.programs_kept)
        while len(self._children) > self._settings.children_kept:
            self.discard(next(iter(self._children)))
        self._spare = self._start()
        return child

    def place_model(self, tenant: str, sha256: str, source: Path) -> None:
        """Make a model's file appear in the inbox of the tenant's child."""
        self._inboxes[tenant].place_model(sha256, source)

    def discard(self, tenant: str) -> None:
        """End a tenant's child; the next job gets the spare."""
        child = self._children.pop(tenant, None)
        if child is not None:
            del self._inboxes[tenant]
            child.kill()

    def close(self) -> None:
        """End all children."""
        for tenant in list(self._children):
            self.discard(tenant)
        if self._spare is not None:
            self._spare.kill()
            self._spare = None

    def _start(self) -> Confined:
        settings = self._settings
        return launch(
            "curvature_worker.child",
            scratch=self._scratch,
            options={
                "device": settings.device,
                "threads": settings.threads,
                "programs_kept": settings.programs_kept,
                "programs_bytes": settings.programs_bytes,
                "budget_bytes": self._budget_bytes,
            },
            limits={} if self._memory_limit is None else {"AS": self._memory_limit},
            threads=settings.threads,
        )

    def _take_spare(self, check: Callable[[], None]) -> Confined:
        """A ready child out of reserve. One that died while idle is replaced: nobody's job is to blame for it."""
        for attempt in range(1, _STARTS + 1):
            child, self._spare = self._spare or self._start(), None
            try:
                self._await_ready(child, check)
                if child.alive:
                    return child
                child.kill()
            except WorkerUnfit as error:
                child.kill()
                if attempt == _STARTS:
                    raise
                logger.warning("%s; starting another", error)
            except BaseException:
                self._spare = child  # the job went away, the child is as good as before
                raise
        raise WorkerUnfit("the computing process ends as soon as it has started")

    def _await_ready(self, child: Confined, check: Callable[[], None]) -> None:
        """Wait until a child has said `ready`.

        Raises:
            WorkerUnfit: if it does not, or is less confined than required.
        """
        deadline = time.monotonic() + self._settings.start_seconds
        while not child.greeting:
            try:
                message = child.channel.receive(self._settings.poll_seconds)
            except ChannelClosed as error:
                raise WorkerUnfit(
                    f"the computing process {child.death().how} while starting; the lines above say why"
                ) from error
            if message is not None and message.get("event") != "ready":
                raise WorkerUnfit(f"{message.get('message')}; {message.get('remedy')}")
            if message is None and time.monotonic() > deadline:
                raise WorkerUnfit(f"the computing process did not start within {self._settings.start_seconds:.0f} s")
            child.greeting = message or {}
            check()
        self._check_isolation(str(child.greeting["isolation"]))

    def _check_isolation(self, isolation: str) -> None:
        if self._settings.require_isolation and not {"landlock", "seccomp"} <= set(isolation.split("+")):
            raise WorkerUnfit(
                f"isolation is required, but only {isolation} is in force: Linux 5.13 with Landlock and libseccomp "
                "are needed; install libseccomp2, or start without --require-isolation"
            )


def _nothing() -> None:
    return
