"""Sending what the server lacks: small payloads in one request, large ones part by part."""

from collections.abc import Iterator
from typing import Any

from curvature_client._errors import NotFoundError
from curvature_client._parted_uploads import PartedUpload
from curvature_client._payloads import Payload
from curvature_client._progress import ProgressBar, UploadWatcher
from curvature_client._transport import Transport
from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind

IN_PARTS_BYTES = 32 * 2**20
"""What is larger goes in parts, so that a broken connection costs no more than one of them."""


def upload(transport: Transport, kind: ArtefactKind, payload: Payload, progress: bool | None) -> None:
    """Upload a payload under its hash, with a bar where somebody sees it."""
    with ProgressBar(progress) as bar:
        send(transport, kind, payload, bar)


def send(transport: Transport, kind: ArtefactKind, payload: Payload, watcher: UploadWatcher) -> None:
    """Upload a payload under its hash; what the watcher raises ends the upload."""
    if payload.size_bytes > IN_PARTS_BYTES and PartedUpload(transport, kind, payload, watcher).run():
        return
    _upload_whole(transport, kind, payload, watcher)


def is_stored(transport: Transport, kind: ArtefactKind, sha256: str) -> bool:
    """Whether the server has it already."""
    try:
        transport.request("HEAD", f"/v1/{kind}/{sha256}")
    except NotFoundError:
        return False
    return True


def _upload_whole(transport: Transport, kind: ArtefactKind, payload: Payload, watcher: UploadWatcher) -> None:
    def body() -> Any:
        watcher.upload(f"the {SINGULAR[kind]}", payload.size_bytes)
        return _counted(payload.chunks(), watcher)

    response = transport.request(
        "PUT",
        f"/v1/{kind}/{payload.sha256}",
        body=body,
        headers={"Content-Length": str(payload.size_bytes), "Content-Type": "application/octet-stream"},
    )
    transport.parse(response, Artefact)


def _counted(chunks: Iterator[bytes], watcher: UploadWatcher) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        watcher.uploaded(len(chunk))
