"""A progress bar in terminals and notebooks; silence elsewhere."""

import sys
from types import TracebackType
from typing import Any

from curvature_protocol.jobs import JobStatus, Progress


class ProgressBar:
    """One job's bar: what happens now, and how many columns of how many are through.

    Args:
        shown: True or False; None shows it where a person looks on.
    """

    def __init__(self, shown: bool | None) -> None:
        self.shown = _has_audience() if shown is None else shown
        self._bar: Any = None
        self._phase = ""

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def upload(self, what: str, size_bytes: int) -> None:
        """An upload begins."""
        self._begin(f"uploading {what}", size_bytes, unit="B", unit_scale=True)

    def uploaded(self, count: int) -> None:
        """So many bytes went out."""
        if self._bar is not None:
            self._bar.update(count)

    def job(self, status: JobStatus, progress: Progress | None) -> None:
        """A job's state or progress."""
        phase = status.value if progress is None or status != JobStatus.RUNNING else progress.phase
        total = 0 if progress is None else progress.total
        if phase != self._phase or (self._bar is not None and total and self._bar.total != total):
            self._begin(phase, total or None, unit="column")
        if self._bar is not None and progress is not None and progress.total:
            self._bar.n = progress.done
            self._bar.refresh()

    def _begin(self, phase: str, total: int | None, **options: Any) -> None:
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.close()
        from tqdm.auto import tqdm

        self._phase = phase
        layout: dict[str, Any] = {} if total else {"bar_format": "{desc} [{elapsed}]"}
        self._bar = tqdm(total=total, desc=phase, leave=False, file=sys.stderr, **layout, **options)


def _has_audience() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
