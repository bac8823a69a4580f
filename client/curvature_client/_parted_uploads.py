"""One large upload, part by part: several at once, each sent again when its connection breaks.

The server finds an upload by its hash. So whoever sends the same bytes, be it in another process a day later, goes on
where the last one stopped.
"""

import base64
import hashlib
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event, Lock

from curvature_client._errors import APIConnectionError, APIStatusError, BadRequestError, CurvatureError, NotFoundError
from curvature_client._payloads import Payload
from curvature_client._progress import UploadWatcher
from curvature_client._store import StoreRefused, StoreUnreachable
from curvature_client._transport import Transport
from curvature_protocol.artefacts import SINGULAR, ArtefactKind
from curvature_protocol.uploads import PartAddress, Upload, UploadPart

PARTS_AT_ONCE = 3
PATIENCE = 4
"""A large upload waits longer than other requests for a server that starts again."""
_MOST_ROUNDS = 6
_WAIT_SECONDS = 20.0
_STORE = "store_refused"
_BEGIN_AGAIN = frozenset({"upload_not_found", "upload_incomplete"})
"""Somebody gave the upload up, or parts were lost: what is missing is sent again."""


class PartedUpload:
    """Sends one payload in parts."""

    def __init__(self, transport: Transport, kind: ArtefactKind, payload: Payload, bar: UploadWatcher) -> None:
        self._transport, self._kind, self._payload, self._bar = transport, kind, payload, bar
        self._lock = Lock()
        self._stopped = Event()
        self._store_answered = False

    def run(self) -> bool:
        """Send what the server lacks; False if it takes no uploads in parts: one of the version before."""
        for last in (*[False] * (_MOST_ROUNDS - 1), True):
            try:
                upload = self._begin()
            except NotFoundError as error:
                if error.code == "not_found":
                    return False
                raise
            if upload.artefact is not None:
                return True
            missing = self._missing(upload)
            resumed = len(missing) < _count(upload)
            try:
                self._send(upload, missing)
                if self._complete(upload):
                    return True
            except StoreUnreachable:
                self._transport.store.usable = False  # the next round goes through the server
            except APIStatusError as error:
                # Wrong parts may be those of an earlier process: the server has dropped them all.
                again = error.code in _BEGIN_AGAIN or (error.code == "hash_mismatch" and resumed)
                if last or not again:
                    raise
                if error.code == "upload_incomplete" and upload.direct:
                    self._transport.store.usable = False  # it took all parts, and has not got them
        raise APIConnectionError(
            f"the {SINGULAR[self._kind]} could not be uploaded: its parts did not stay with the server",
            code="connection_lost",
            remedy="try again; what has arrived is not sent again",
        )

    def _begin(self) -> Upload:
        wanted = {
            "kind": self._kind,
            "sha256": self._payload.sha256,
            "size_bytes": self._payload.size_bytes,
            "direct": self._transport.store.usable,
        }
        response = self._transport.request("POST", "/v1/uploads", json=wanted, patience=PATIENCE)
        return self._transport.parse(response, Upload)

    def _missing(self, upload: Upload) -> list[int]:
        """Numbers of the parts to send, and the bar at what is there."""
        here = {part.number for part in upload.parts if self._is_ours(upload, part)}
        self._bar.upload(f"the {SINGULAR[self._kind]}", self._payload.size_bytes)
        self._bar.uploaded(sum(part.size_bytes for part in upload.parts if part.number in here))
        return [number for number in range(1, _count(upload) + 1) if number not in here]

    def _is_ours(self, upload: Upload, part: UploadPart) -> bool:
        return part.sha256 is None or part.sha256 == self._digest(*_span(upload, part.number)).hex()

    def _send(self, upload: Upload, numbers: list[int]) -> None:
        """Send parts, several at once; the first that fails for good stops the others."""
        send = self._send_directly if upload.direct else self._send_to_server
        self._stopped.clear()
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="curvature-upload") as pool:
            sent = [pool.submit(send, upload, number) for number in numbers]
            try:
                done, _ = wait(sent, return_when=FIRST_EXCEPTION)
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        for part in done:
            part.result()

    def _send_to_server(self, upload: Upload, number: int) -> None:
        start, end = _span(upload, number)
        headers = {"Content-Length": str(end - start), "Content-Type": "application/octet-stream"}

        def attempt() -> None:
            digest = _header(self._digest(start, end))
            try:
                with self._sending(start, end) as body:
                    self._transport.once(
                        "PUT",
                        _path(upload, number),
                        UploadPart,
                        content=body,
                        headers={**headers, "Content-Digest": digest},
                    )
            except BadRequestError as error:  # other bytes arrived than were hashed
                raise APIConnectionError(error.message, code=error.code, remedy=error.remedy) from error

        self._transport.retrying(attempt, PATIENCE, self._stopped)

    def _send_directly(self, upload: Upload, number: int) -> None:
        """Send a part to the store; once that has worked, a failure is one of the connection and passes."""
        start, end = _span(upload, number)
        headers = {"Content-Digest": _header(self._digest(start, end))}

        def attempt() -> None:
            self._check()
            address = self._transport.once("POST", _path(upload, number), PartAddress, headers=headers)
            try:
                with (
                    self._sending(start, end) as body,
                    self._transport.store.stream("PUT", address.url, headers=address.headers, content=body) as response,
                ):
                    response.read()
            except (StoreRefused, StoreUnreachable) as error:
                if isinstance(error, StoreUnreachable) and not self._store_answered:
                    raise
                raise APIConnectionError(str(error), code=_STORE, remedy="try again") from error
            self._store_answered = True

        try:
            self._transport.retrying(attempt, PATIENCE if self._store_answered else 1, self._stopped)
        except APIConnectionError as error:
            if error.code == _STORE:
                raise StoreUnreachable(str(error)) from error
            raise

    def _complete(self, upload: Upload) -> bool:
        """Have the parts put together, however long that takes; False if they were lost meanwhile."""
        path = f"/v1/uploads/{upload.id}/complete"
        while True:
            response = self._transport.request(
                "POST",
                path,
                params={"wait": _WAIT_SECONDS},
                timeout=self._transport.timeout_beyond(_WAIT_SECONDS),
                patience=PATIENCE,
            )
            found = self._transport.parse(response, Upload)
            if not found.assembling:
                return found.artefact is not None

    def _digest(self, start: int, end: int) -> bytes:
        digest = hashlib.sha256()
        for chunk in self._payload.chunks(start, end):
            digest.update(chunk)
        return digest.digest()

    @contextmanager
    def _sending(self, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes of one part for one attempt; what an attempt that fails has sent is taken off the bar again."""
        sent = 0

        def chunks() -> Iterator[bytes]:
            nonlocal sent
            for chunk in self._payload.chunks(start, end):
                self._check()
                yield chunk
                sent += len(chunk)
                self._count(len(chunk))

        try:
            yield chunks()
        except BaseException:
            self._count(-sent)
            raise

    def _count(self, change: int) -> None:
        with self._lock:
            self._bar.uploaded(change)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise CurvatureError("the upload was stopped", code="cancelled", remedy="start it again")


def _count(upload: Upload) -> int:
    return -(-upload.size_bytes // upload.part_bytes)


def _span(upload: Upload, number: int) -> tuple[int, int]:
    """(first byte, byte after the last) of a part."""
    start = (number - 1) * upload.part_bytes
    return start, min(start + upload.part_bytes, upload.size_bytes)


def _header(digest: bytes) -> str:
    """As RFC 9530 writes a SHA-256."""
    return f"sha-256=:{base64.b64encode(digest).decode()}:"


def _path(upload: Upload, number: int) -> str:
    return f"/v1/uploads/{upload.id}/parts/{number}"
