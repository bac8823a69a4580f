"""Bytes of stored result files: by HTTP ranges, continued after a broken connection, or from a reply's own body."""

from collections.abc import Callable
from typing import Protocol

from curvature_client._errors import APIConnectionError
from curvature_client._transport import Transport

WHOLE_FILE_BYTES = 2**20
"""A smaller file is read whole at its first use: one request instead of one per tensor."""


class StoredFile:
    """One `{label}.safetensors` on the server."""

    def __init__(self, transport: Transport, path: str, size_bytes: int) -> None:
        self._transport, self._path, self.size_bytes = transport, path, size_bytes
        self._whole: bytearray | None = None

    def read(self, start: int, end: int) -> bytearray:
        """Its bytes from `start` to before `end`.

        Raises:
            APIConnectionError: the connection broke, and again after all retries.
        """
        if self._whole is None and self.size_bytes <= WHOLE_FILE_BYTES:
            self._whole = self._fetch(0, self.size_bytes)
        return self._fetch(start, end) if self._whole is None else self._whole[start:end]

    def stream(self, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand the bytes over as they come; what has come is not asked for again."""
        if self._whole is not None:
            sink(bytes(self._whole[start:end]))
            return
        arrived = start

        def attempt() -> None:
            nonlocal arrived
            headers = {"Range": f"bytes={arrived}-{end - 1}"}
            with self._transport.stream("GET", self._path, headers=headers) as response:
                if response.status_code != 206:
                    raise APIConnectionError(
                        f"{self._path} was answered whole where a range was asked for",
                        code="invalid_reply",
                        remedy="look for a proxy between client and server that drops Range",
                    )
                for part in response.iter_raw():
                    sink(part)
                    arrived += len(part)

        while arrived < end:
            self._transport.retrying(attempt)

    def _fetch(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        place = 0

        def take(part: bytes) -> None:
            nonlocal place
            data[place : place + len(part)] = part
            place += len(part)

        self.stream(start, end, take)
        return data


class InlineFile:
    """A small file that came inside the reply."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, start: int, end: int) -> bytearray:
        """Its bytes from `start` to before `end`."""
        return bytearray(self._data[start:end])

    def stream(self, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand the bytes over."""
        sink(self._data[start:end])


class File(Protocol):
    """What results read from."""

    def read(self, start: int, end: int) -> bytearray:
        """Its bytes from `start` to before `end`."""
        ...

    def stream(self, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand the bytes over as they come."""
        ...
