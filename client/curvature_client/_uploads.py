"""Sending what the server lacks."""

from collections.abc import Iterator
from typing import Any

from curvature_client._payloads import Payload
from curvature_client._progress import ProgressBar
from curvature_client._transport import Transport
from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind


def upload(transport: Transport, kind: ArtefactKind, payload: Payload, progress: bool | None) -> None:
    """Upload a payload under its hash, with a bar where somebody sees it."""
    with ProgressBar(progress) as bar:

        def body() -> Any:
            bar.upload(f"the {SINGULAR[kind]}", payload.size_bytes)
            return _counted(payload.chunks(), bar)

        response = transport.request(
            "PUT",
            f"/v1/{kind}/{payload.sha256}",
            body=body,
            headers={"Content-Length": str(payload.size_bytes), "Content-Type": "application/octet-stream"},
        )
    transport.parse(response, Artefact)


def _counted(chunks: Iterator[bytes], bar: ProgressBar) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        bar.uploaded(len(chunk))
