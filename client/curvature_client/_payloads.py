"""Bytes to upload, known by their SHA-256: in memory, or in a file that is streamed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from curvature_client._errors import refusal

CHUNK_BYTES = 2**20

IN_MEMORY_BYTES = 64 * 2**20
"""What is larger stays in a temporary file and is streamed from there."""


@dataclass(frozen=True)
class Payload:
    """One model file or batch file; exactly one of `data` and `path` is set."""

    sha256: str
    size_bytes: int
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of_bytes(cls, data: bytes) -> "Payload":
        """Bytes in memory."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), data=data)

    @classmethod
    def of_file(cls, path: Path) -> "Payload":
        """A file, read once to hash it and again to send it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return cls(digest.hexdigest(), path.stat().st_size, path=path)

    def read(self) -> bytes:
        """All of it."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """All of it, or the bytes from `start` to before `end`, in parts, anew for each attempt to send it."""
        end = self.size_bytes if end is None else end
        if self.data is not None:
            for first in range(start, end, CHUNK_BYTES):
                yield self.data[first : min(first + CHUNK_BYTES, end)]
            return
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(start)
            while start < end and (chunk := file.read(min(CHUNK_BYTES, end - start))):
                yield chunk
                start += len(chunk)


def existing_file(path: Path, param: str) -> Path:
    """The path, if a file is there.

    Raises:
        UnprocessableError: there is none.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise refusal(
            f"invalid_{param}",
            f"{path} {what}; a file is expected",
            param=param,
            remedy=f"check the path (the current folder is {Path.cwd()})",
        )
    return path
