"""Artefacts on the worker's own disk, by hash."""

import hashlib
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from obstore.exceptions import BaseError as StoreError

from curvature_protocol.artefacts import SINGULAR, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_state import ObjectStore
from curvature_worker.errors import JobRefused

_READ_BYTES = 2**20

Check = Callable[[], None]
"""Called between pieces of a long transfer; raises what is to end it."""
Verdict = Callable[[ArtefactKind, str, bool], None]
"""Told of an upload that came over the network whether its bytes are those of its hash."""


class ArtefactCache:
    """Fetches objects to a folder and keeps them under a size limit, least recently used first out.

    A store that is a folder on this machine is read in place.
    """

    def __init__(self, objects: ObjectStore, folder: Path, limit_bytes: int, verdict: Verdict | None = None) -> None:
        self._objects, self._folder, self._limit, self._verdict = objects, folder, limit_bytes, verdict
        folder.mkdir(parents=True, exist_ok=True)

    def fetch_upload(self, kind: ArtefactKind, sha256: str, check: Check) -> Path:
        """The local file of an upload, its hash verified when it came over the network.

        Raises:
            JobRefused: if it is gone, damaged, or the store does not answer.
        """
        what = SINGULAR[kind]
        path = self._fetch(artefact_key(kind, sha256), (kind, sha256), check)
        if path is None:
            raise JobRefused(
                f"{what}_not_found", f"the {what} {sha256} is no longer stored", param=what, remedy="upload it again"
            )
        return path

    def fetch(self, key: str, check: Check) -> Path | None:
        """The local file of an object of our own making, or None if there is none.

        Raises:
            JobRefused: if the store does not answer.
        """
        return self._fetch(key, None, check)

    def _fetch(self, key: str, upload: tuple[ArtefactKind, str] | None, check: Check) -> Path | None:
        local = self._objects.local_path(key)
        if local is not None:
            return local if local.is_file() else None
        path = self._folder / key.replace("/", "-")
        if path.is_file():
            os.utime(path)
            return path
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            found = self._download(key, part, check)
            if upload is not None:
                if found != upload[1]:  # once more: they may have been replaced by the right ones in the middle
                    found = self._download(key, part, check)
                self._judge(*upload, found)
            part.replace(path)
        except FileNotFoundError:
            return None
        except StoreError as error:
            raise JobRefused("unavailable", f"the object store does not answer: {error}", remedy="try later") from error
        finally:
            part.unlink(missing_ok=True)
        self._shrink(path)
        return path

    def _judge(self, kind: ArtefactKind, sha256: str, found: str) -> None:
        """Pass on whether the bytes are right.

        Raises:
            JobRefused: they are not.
        """
        if self._verdict is not None:
            self._verdict(kind, sha256, found == sha256)
        if found != sha256:
            what = SINGULAR[kind]
            raise JobRefused(
                "hash_mismatch",
                f"the {what} that was uploaded as {sha256} has the SHA-256 {found}; it was removed",
                param=what,
                remedy="submit the job again: the client uploads it anew",
            )

    def _download(self, key: str, target: Path, check: Check) -> str:
        """Copy an object to a file; returns its SHA-256."""
        digest = hashlib.sha256()
        with target.open("wb") as file:
            for part in self._objects.stream(key):
                check()
                digest.update(part)
                file.write(part)
        return digest.hexdigest()

    def _shrink(self, wanted: Path) -> None:
        """Remove the least recently used files until the limit is kept, but not the one that is wanted now."""
        files = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self._folder.iterdir() if p.is_file())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._limit:
                return
            if path != wanted:
                path.unlink(missing_ok=True)
                total -= size


class Inbox:
    """The models in a child's inbox: as many as the child keeps loaded, in the same order of use."""

    def __init__(self, folder: Path, models_kept: int) -> None:
        self._folder, self._kept = folder, models_kept
        self._models: OrderedDict[str, None] = OrderedDict()

    def place_model(self, sha256: str, source: Path) -> None:
        """Make a model's file appear, unless it is there; the least recently used one goes when there are too many."""
        if sha256 not in self._models:
            place(source, self._folder / sha256)
        self._models[sha256] = None
        self._models.move_to_end(sha256)
        while len(self._models) > self._kept:
            oldest, _ = self._models.popitem(last=False)
            (self._folder / oldest).unlink(missing_ok=True)


def place(source: Path, target: Path) -> None:
    """Make `source` appear at `target`, without copying where the file system allows."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
