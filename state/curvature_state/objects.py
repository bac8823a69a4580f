"""Bytes by key: a local folder, memory, or S3, through one small interface over obstore."""

import errno
import os
import shutil
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, MemoryStore, from_url

from curvature_state.s3 import Bucket

PART_BYTES = 8 * 2**20
"""Size of the parts in which objects are written and read; S3 takes none below 5 MiB."""
SENT_BYTES = 2**20
"""Size of the parts that go out to clients: each is copied a few times on its way through the web server."""
_WRITTEN_AT_ONCE = 2
"""Parts that wait for the store while the next one comes; more would only be held in memory."""
_MOST_PARTS = 10_000
"""S3's limit on the parts of one object."""


class StoredObject(NamedTuple):
    """An object without its bytes; `changed_at` is a POSIX time."""

    key: str
    size_bytes: int
    changed_at: float


class ObjectStore:
    """One store; keys are relative paths with forward slashes.

    Args:
        url: `file:///folder`, `memory:///` or `s3://bucket/prefix`.
        public_endpoint: the store's address as clients see it, if it is another one than the store's own; S3 only.

    Attributes:
        bucket: what S3 alone can do; None for other stores.
    """

    def __init__(self, url: str, public_endpoint: str | None = None) -> None:
        parts = urlsplit(url)
        self.bucket: Bucket | None = None
        self._folder: Path | None = None
        self._store: obstore.store.ObjectStore
        if parts.scheme == "file":
            self._folder = Path(unquote(parts.path))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._store = LocalStore(prefix=self._folder)
        elif parts.scheme == "memory":
            self._store = MemoryStore()
        elif parts.scheme == "s3":
            self.bucket = Bucket(url, public_endpoint)
            self._store = self.bucket.open_store()
        else:
            self._store = from_url(url)

    def ping(self) -> None:
        """Raise if the store cannot be written or does not answer."""
        if self._folder is None:
            # Not by asking for an object: a bucket that is not there answers the same as an object that is not.
            obstore.list_with_delimiter(self._store, "ping")
        elif not (self._folder.is_dir() and os.access(self._folder, os.W_OK | os.X_OK)):
            raise RuntimeError(f"the folder {self._folder} is gone or cannot be written")

    def local_path(self, key: str) -> Path | None:
        """Where a key lies on this machine's disk, if the store is a folder."""
        return None if self._folder is None else self._folder / key

    def put_stream(self, key: str, chunks: Iterable[bytes]) -> int:
        """Store what `chunks` yields, in parts; returns its size. An exception in `chunks` stores nothing."""
        size = 0
        with obstore.open_writer(self._store, key, buffer_size=PART_BYTES) as writer:
            for chunk in chunks:
                writer.write(chunk)
                size += len(chunk)
        return size

    async def put_async_stream(self, key: str, chunks: AsyncIterable[bytes | memoryview], most_bytes: int = 0) -> int:
        """`put_stream` for an asynchronous source: nothing is stored if it raises.

        Args:
            key: where to.
            chunks: the bytes.
            most_bytes: how many may come, where they may be more than 78 GiB.
        """
        size = 0
        part_bytes = _part_bytes(most_bytes)
        async with obstore.open_writer_async(
            self._store, key, buffer_size=part_bytes, max_concurrency=_WRITTEN_AT_ONCE
        ) as writer:
            async for chunk in chunks:
                await writer.write(chunk)
                size += len(chunk)
        return size

    async def async_stream(self, key: str, start: int, end: int) -> AsyncIterator[memoryview]:
        """The bytes from `start` to before `end`, in parts: one request to the store, read as fast as it is taken."""
        if start >= end:
            return
        found = await obstore.get_async(self._store, key, options={"range": (start, end)})
        async for part in found.stream(min_chunk_size=SENT_BYTES):
            yield memoryview(part)

    def put_file(self, key: str, path: Path) -> int:
        """Store a file; returns its size. In a folder store it is moved there if it lies on the same disk."""
        size = path.stat().st_size
        if self._folder is not None:
            target = self._folder / key
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                os.replace(path, target)  # noqa: PTH105 (rename across folders, atomic)
                return size
        with path.open("rb") as file:
            obstore.put(self._store, key, file, chunk_size=_part_bytes(size))
        return size

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store a few bytes; in a folder by a rename, several times as fast as the library's way."""
        if self._folder is None:
            obstore.put(self._store, key, data)
            return
        target = self._folder / key
        part = target.with_name(f"{target.name}#{uuid.uuid4().hex}")  # a name that `delete_torn` knows
        try:
            try:
                part.write_bytes(data)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        """Give stored bytes their final key (a rename in a folder, copy and delete elsewhere)."""
        if self.bucket is not None:
            self.bucket.copy(source, target)
            self.delete(source)
        else:
            obstore.rename(self._store, source, target)

    def get_bytes(self, key: str) -> bytes:
        """All bytes of a small object.

        Raises:
            FileNotFoundError: if there is none.
        """
        return bytes(obstore.get(self._store, key).bytes())

    def get_to_file(self, key: str, path: Path) -> None:
        """Copy an object to a file."""
        with path.open("wb") as file:
            for chunk in self.stream(key):
                file.write(chunk)

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `end`, in parts."""
        total = self.head(key)
        if total is None:
            raise FileNotFoundError(key)
        end = total if end is None else min(end, total)
        for first in range(start, end, PART_BYTES):
            yield bytes(obstore.get_range(self._store, key, start=first, end=min(first + PART_BYTES, end)))

    def head(self, key: str) -> int | None:
        """The object's size, or None if there is none."""
        try:
            return int(obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if there is none."""
        with suppress(FileNotFoundError):
            obstore.delete(self._store, key)

    def delete_below(self, prefix: str) -> None:
        """Remove all objects below a prefix, however many."""
        if self._folder is None:
            for page in obstore.list(self._store, prefix=prefix):
                obstore.delete(self._store, [str(item["path"]) for item in page])
            return
        folder = self._folder / prefix
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # somebody else removes it, or writes to it
                raise
        if "/" in folder.parent.relative_to(self._folder).as_posix():
            with suppress(OSError):  # there is something else in it
                folder.parent.rmdir()

    def walk(self, prefix: str) -> Iterator[StoredObject]:
        """What lies below a prefix."""
        for page in obstore.list(self._store, prefix=prefix):
            for item in page:
                yield StoredObject(str(item["path"]), int(item["size"]), item["last_modified"].timestamp())

    def list(self, prefix: str) -> Iterator[tuple[str, float]]:
        """(key, age of last change as a POSIX time) below a prefix."""
        for page in obstore.list(self._store, prefix=prefix):
            for item in page:
                yield str(item["path"]), item["last_modified"].timestamp()

    def delete_older(self, prefix: str, before: float, kept: Collection[str] = ()) -> None:
        """Remove what lies below a prefix and was last changed before a POSIX time, but keys of `kept` and below them.

        That includes parts of uploads whose process was killed: the store does not list those.
        """
        for key, changed_at in list(self.list(prefix)):
            if changed_at < before and not any(key == name or key.startswith(f"{name}/") for name in kept):
                self.delete(key)
        self.delete_torn(prefix, before, kept)

    def delete_torn(self, prefix: str, before: float, kept: Collection[str] = ()) -> None:
        """Remove what a process killed while writing left below a prefix, last changed before a POSIX time."""
        if self.bucket is not None:
            self.bucket.abort_older(prefix, before, kept)
        if self._folder is not None:
            for path in (self._folder / prefix).rglob("*#*"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        path.unlink()


def _part_bytes(size: int) -> int:
    """The size of the parts in which so many bytes are written."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))
