"""Uploads beside the work that makes them: a few threads, a few payloads at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

from curvature_client._errors import CurvatureError
from curvature_client._payloads import Payload
from curvature_client._transport import Transport
from curvature_client._uploads import is_stored, send
from curvature_protocol.artefacts import ArtefactKind

THREADS = 2
MOST_UNSENT = 3
"""So many payloads are being sent or wait to be; whoever brings another waits."""


class Uploads:
    """Sends payloads that the server lacks, each once, while the caller goes on.

    Leaving the with-block waits for all of them, or, when an error leaves it, stops them.

    Args:
        transport: the server.
        kind: what the payloads are.
        sent: called after each.
    """

    def __init__(self, transport: Transport, kind: ArtefactKind, sent: Callable[[], object]) -> None:
        self._transport, self._kind, self._sent = transport, kind, sent
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="curvature-upload")
        self._unsent: set[Future[None]] = set()
        self._known: set[str] = set()
        self._stopped = threading.Event()
        self._telling = threading.Lock()

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                while self._unsent:
                    self._await_one()
        finally:
            self._stopped.set()
            self._pool.shutdown(cancel_futures=True)

    def add(self, payload: Payload, discard: Callable[[], object]) -> None:
        """Send a payload soon; `discard` is called as soon as it is not needed any more.

        Raises:
            CurvatureError: an earlier payload could not be sent.
        """
        while len(self._unsent) >= MOST_UNSENT:
            self._await_one()
        self._unsent.add(self._pool.submit(self._send, payload, discard, payload.sha256 in self._known))
        self._known.add(payload.sha256)

    def _await_one(self) -> None:
        done, self._unsent = wait(self._unsent, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def _send(self, payload: Payload, discard: Callable[[], object], known: bool) -> None:
        try:
            _Stoppable(self._stopped).uploaded(0)
            if not known and not is_stored(self._transport, self._kind, payload.sha256):
                send(self._transport, self._kind, payload, _Stoppable(self._stopped))
        finally:
            discard()
        with self._telling:
            self._sent()


class _Stoppable:
    """Watches an upload and ends it when all are given up."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    def upload(self, what: str, size_bytes: int) -> None:
        """An upload begins."""
        self.uploaded(0)

    def uploaded(self, count: int) -> None:
        """So many bytes went out."""
        if self._stopped.is_set():
            raise CurvatureError("the upload was stopped", code="cancelled", remedy="start it again")
