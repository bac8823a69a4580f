"""Bytes of stored result files, by HTTP ranges, continued after a broken connection; or from a reply's own body.

Where the object store can sign addresses, large files come from there and not through the server.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import httpx

from curvature_client._errors import APIConnectionError
from curvature_client._store import StoreRefused, StoreUnreachable
from curvature_client._transport import Transport
from curvature_protocol.results import Manifest, StoredPart

WHOLE_FILE_BYTES = 2**20
"""A smaller file is read whole at its first use: one request instead of one per tensor."""


class StoredFile:
    """One `{label}.safetensors` on the server, or at an address of the object store that the server gives out.

    Of a file whose size is not known, only what is asked for is read.
    """

    def __init__(self, transport: Transport, path: str, size_bytes: int | None) -> None:
        self._transport, self._path, self.size_bytes = transport, path, size_bytes
        self._whole: bytearray | None = None
        self._address: str | None = None
        """Where the store has it; good for a while."""

    def read(self, start: int, end: int) -> bytearray:
        """Its bytes from `start` to before `end`.

        Raises:
            APIConnectionError: the connection broke, and again after all retries.
        """
        if self._whole is None and self.size_bytes is not None and self.size_bytes <= WHOLE_FILE_BYTES:
            self._whole = self._fetch(0, self.size_bytes)
        return self._fetch(start, end) if self._whole is None else self._whole[start:end]

    def stream(self, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand the bytes over as they come; what has come is not asked for again."""
        if self._whole is not None:
            sink(bytes(self._whole[start:end]))
            return
        arrived = start

        def take(response: httpx.Response) -> None:
            nonlocal arrived
            for part in response.iter_raw():
                sink(part)
                arrived += len(part)

        while arrived < end:
            self._transport.retrying(lambda: self._ask(arrived, end, take))

    def _ask(self, start: int, end: int, take: Callable[[httpx.Response], None]) -> None:
        """One request for what is still missing: to the store where the server sends us there, else to the server."""
        wanted = {"Range": f"bytes={start}-{end - 1}"}
        known = self._address is not None
        if not known:
            # A file that is read whole at once is not worth a second request.
            size_bytes = end - start if self.size_bytes is None else self.size_bytes
            elsewhere = self._transport.store.usable and size_bytes > WHOLE_FILE_BYTES
            with self._transport.stream(
                "GET",
                self._path,
                headers=wanted,
                params={"direct": "true"} if elsewhere else {},
                follow_redirects=False,
            ) as response:
                if response.status_code != 307:
                    self._check_range(response)
                    take(response)
                    return
                self._address = response.headers.get("location")
        if self._address is not None:
            self._ask_store(self._address, wanted, take, fresh=not known)

    def _ask_store(
        self, address: str, wanted: dict[str, str], take: Callable[[httpx.Response], None], *, fresh: bool
    ) -> None:
        """One request to the store; an address that is no longer good is forgotten, and the caller asks for another."""
        store = self._transport.store
        try:
            with store.stream("GET", address, headers=wanted) as response:
                if response.status_code != 206:
                    raise StoreRefused("the object store does not know ranges")
                take(response)
        except StoreUnreachable:
            self._address, store.usable = None, False
        except StoreRefused:
            self._address = None
            if fresh:
                store.usable = False

    def _check_range(self, response: httpx.Response) -> None:
        if response.status_code != 206:
            raise APIConnectionError(
                f"{self._path} was answered whole where a range was asked for",
                code="invalid_reply",
                remedy="look for a proxy between client and server that drops Range",
            )

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


class ResultFiles:
    """The files that a result's tensors lie in: its own, and those of its data set's shards.

    Args:
        transport: the server.
        manifest: the result's.
        inline: label → file that came inside the reply.
    """

    def __init__(self, transport: Transport, manifest: Manifest, inline: Mapping[str, bytes] | None = None) -> None:
        self._transport = transport
        self._own: dict[str, File] = {
            group.label: StoredFile(transport, _path(manifest.job_id, group.label), group.file_bytes)
            for group in manifest.groups
        }
        self._own.update({label: InlineFile(data) for label, data in (inline or {}).items()})

    def of(self, label: str) -> "File":
        """A group's own file."""
        return self._own[label]

    def of_part(self, part: StoredPart) -> "File":
        """The file of the shard that keeps a part of a tensor."""
        return StoredFile(self._transport, _path(part.job_id, part.label), None)


def _path(job_id: str, label: str) -> str:
    return f"/v1/jobs/{job_id}/result/{label}.safetensors"


class File(Protocol):
    """What results read from."""

    def read(self, start: int, end: int) -> bytearray:
        """Its bytes from `start` to before `end`."""
        ...

    def stream(self, start: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Hand the bytes over as they come."""
        ...
