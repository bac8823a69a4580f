"""Artefacts on the worker's own disk, by hash."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from curvature_protocol.names import artefact_key
from curvature_state import ObjectStore
from curvature_worker.errors import JobRefused

_READ_BYTES = 2**20


class ArtefactCache:
    """Fetches objects to a folder and keeps them under a size limit, least recently used first out.

    A store that is a folder on this machine is read in place.
    """

    def __init__(self, objects: ObjectStore, folder: Path, limit_bytes: int) -> None:
        self._objects, self._folder, self._limit = objects, folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def fetch_upload(self, kind: str, sha256: str) -> Path:
        """The local file of an upload, its hash verified when it came over the network.

        Raises:
            JobRefused: if it is gone or damaged.
        """
        return self._fetch(artefact_key(kind, sha256), sha256, kind)

    def fetch(self, key: str) -> Path | None:
        """The local file of an object of our own making, or None if there is none."""
        try:
            return self._fetch(key, None, "object")
        except JobRefused:
            return None

    def _fetch(self, key: str, sha256: str | None, what: str) -> Path:
        local = self._objects.local_path(key)
        if local is not None and local.is_file():
            return local
        path = self._folder / key.replace("/", "-")
        if path.is_file():
            os.utime(path)
            return path
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            self._objects.get_to_file(key, part)
            if sha256 is not None and _hash(part) != sha256:
                raise JobRefused("hash_mismatch", f"the stored {what} {sha256} is damaged", remedy="upload it again")
            part.replace(path)
        except FileNotFoundError as error:
            code = "model_not_found" if what == "models" else "batch_not_found"
            raise JobRefused(code, f"the {what} {sha256} is no longer stored", remedy="upload it again") from error
        finally:
            part.unlink(missing_ok=True)
        self._shrink()
        return path

    def _shrink(self) -> None:
        files = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self._folder.iterdir() if p.is_file())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def place(source: Path, target: Path) -> None:
    """Make `source` appear at `target`, without copying where the file system allows."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
