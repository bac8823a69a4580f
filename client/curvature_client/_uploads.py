"""Sending what the server lacks."""

from collections.abc import Callable, Iterator
from typing import Any

from curvature_client._errors import NotFoundError
from curvature_client._payloads import Payload
from curvature_client._progress import ProgressBar
from curvature_client._transport import Transport
from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind


def upload(transport: Transport, kind: ArtefactKind, payload: Payload, progress: bool | None) -> None:
    """Upload a payload under its hash, with a bar where somebody sees it."""
    with ProgressBar(progress) as bar:
        send(
            transport,
            kind,
            payload,
            begin=lambda: bar.upload(f"the {SINGULAR[kind]}", payload.size_bytes),
            sent=bar.uploaded,
        )


def send(
    transport: Transport,
    kind: ArtefactKind,
    payload: Payload,
    *,
    begin: Callable[[], object],
    sent: Callable[[int], object],
) -> None:
    """Upload a payload under its hash.

    Args:
        transport: the server.
        kind: what the payload is.
        payload: its bytes.
        begin: called before every attempt.
        sent: told of bytes that went out; what either raises ends the upload.
    """

    def body() -> Any:
        begin()
        return _counted(payload.chunks(), sent)

    response = transport.request(
        "PUT",
        f"/v1/{kind}/{payload.sha256}",
        body=body,
        headers={"Content-Length": str(payload.size_bytes), "Content-Type": "application/octet-stream"},
    )
    transport.parse(response, Artefact)


def is_stored(transport: Transport, kind: ArtefactKind, sha256: str) -> bool:
    """Whether the server has it already."""
    try:
        transport.request("HEAD", f"/v1/{kind}/{sha256}")
    except NotFoundError:
        return False
    return True


def _counted(chunks: Iterator[bytes], sent: Callable[[int], object]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        sent(len(chunk))
