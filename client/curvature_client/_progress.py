"""A progress bar in terminals and notebooks; silence elsewhere."""

import sys
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import FINAL, JobStatus

_BEFORE_RUNNING = ("", JobStatus.QUEUED.value, "shards")


class UploadWatcher(Protocol):
    """Who is told of an upload."""

    def upload(self, what: str, size_bytes: int) -> None:
        """An upload begins, perhaps anew."""
        ...

    def uploaded(self, count: int) -> None:
        """So many bytes went out."""
        ...


class ProgressBar:
    """One job's bar: what happens now, and how many columns, shards or parts of how many are through.

    Args:
        shown: True or False; None shows it where a person looks on.
    """

    def __init__(self, shown: bool | None) -> None:
        self.shown = has_audience(shown)
        self._bar: Any = None
        self._phase = ""
        self._since = datetime.now(UTC)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def upload(self, what: str, size_bytes: int) -> None:
        """An upload begins."""
        self._begin(f"uploading {what}", size_bytes, unit="B", unit_scale=True)

    def uploaded(self, count: int) -> None:
        """So many bytes went out."""
        if self._bar is not None:
            self._bar.update(count)

    def parts(self, total: int) -> None:
        """The upload of a data set's parts begins; 0 where nobody knows how many there are."""
        self._begin("uploading part 1", total or None, unit="part")

    def part_sent(self) -> None:
        """One more is there."""
        if self._bar is not None:
            self._bar.n += 1
            now = self._bar.n if self._bar.n == self._bar.total else self._bar.n + 1
            self._bar.set_description_str(f"uploading part {now}")

    def rows(self, total: int, over: int, failed: int) -> None:
        """How many of a sweep's rows are over, and how many of these failed."""
        if self._bar is None:
            self._begin("sweep", total, unit="job")
        if self._bar is not None:
            self._bar.n = over
            if failed:
                self._bar.set_postfix_str(f"{failed} failed", refresh=False)
            self._bar.refresh()

    def job(self, event: JobEvent) -> None:
        """A job's state or progress."""
        if event.status in FINAL:
            self._end()
            return
        computing = event.status == JobStatus.RUNNING and event.event == "progress"
        progress = event.progress if computing or event.status == JobStatus.WAITING else None
        if progress is None and event.status == JobStatus.RUNNING and self._phase not in _BEFORE_RUNNING:
            return  # the phase is known better
        phase = event.status.value if progress is None else progress.phase
        total = 0 if progress is None else progress.total
        if phase != self._phase or (self._bar is not None and total and self._bar.total != total):
            self._begin(phase, total or None, unit="shard" if phase == "shards" else "column")
            self._since = event.at
        if self._bar is not None:
            # By the server's clock: events of the past come all at once, and must not look like speed.
            self._bar.start_t = time.time() - (event.at - self._since).total_seconds()
            self._bar.n = 0 if progress is None else progress.done
            self._bar.refresh()

    def _begin(self, phase: str, total: int | None, **options: Any) -> None:
        if not self.shown:
            return
        self._end()
        from tqdm.auto import tqdm

        self._phase = phase
        layout: dict[str, Any] = {} if total else {"bar_format": "{desc} [{elapsed}]"}
        self._bar = tqdm(total=total, desc=phase, leave=False, file=sys.stderr, **layout, **options)

    def _end(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.bar_format = None  # tqdm blanks as many columns as its own layout would fill
            self._bar.close()
        self._bar = None


def has_audience(shown: bool | None) -> bool:
    """Whether to show a bar: as told, or else where a person looks on."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules if shown is None else shown
