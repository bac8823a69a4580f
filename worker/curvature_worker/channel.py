"""Talk between the worker and a confined process: length-prefixed JSON over a socket made before confinement.

Tensors never travel here: files in the child's folders do. The other side is not trusted: a frame that is too long
or no JSON object closes the channel.
"""

import json
import select
import socket
import struct
from typing import Any

MAX_FRAME_BYTES = 64 * 2**20

_LENGTH = struct.Struct(">I")


class ChannelClosed(Exception):
    """The other side is gone, or sent what no honest one would."""


class Channel:
    """One end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            ChannelClosed: if nobody listens.
        """
        data = json.dumps(message).encode()
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, or None if none begins in time.

        Raises:
            ChannelClosed: if the other side is gone or misbehaves.
        """
        ready, _, _ = select.select([self._socket], [], [], timeout_seconds)
        if not ready:
            return None
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ChannelClosed(f"a frame of {length} bytes was announced")
        try:
            message = json.loads(self._read(length))
        except ValueError as error:
            raise ChannelClosed("a frame is no JSON") from error
        if not isinstance(message, dict):
            raise ChannelClosed("a frame is no JSON object")
        return message

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(min(size - len(parts), 2**20))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other side is gone")
            parts += part
        return bytes(parts)
