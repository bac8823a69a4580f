"""Talk between the worker and a confined process: length-prefixed JSON over a socket made before confinement.

Tensors never travel here: files in the child's folders do. The other side is not trusted: a frame that is too long
or no JSON object closes the channel, and one that begins and never ends keeps nobody waiting.
"""

import json
import socket
import struct
import time
from typing import Any

MAX_FRAME_BYTES = 64 * 2**20

_LENGTH = struct.Struct(">I")
_READ_BYTES = 2**20


class ChannelClosed(Exception):
    """The other side is gone, or sent what no honest one would."""


class Channel:
    """One end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    def send(self, message: dict[str, Any], timeout_seconds: float | None = None) -> None:
        """Send one message.

        Raises:
            ChannelClosed: if nobody listens, or nobody does so in time.
        """
        data = json.dumps(message).encode()
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, or None if none is complete in time.

        Raises:
            ChannelClosed: if the other side is gone or misbehaves.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (frame := self._take_frame()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if not self._read_some(left):
                return None
        return _parse(frame)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _take_frame(self) -> bytes | None:
        """The first frame of what was received, if it is whole."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_FRAME_BYTES:
            raise ChannelClosed(f"a frame of {length} bytes was announced")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        frame = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return frame

    def _read_some(self, seconds: float | None) -> bool:
        """Read what is there; False if nothing came in time."""
        if seconds is not None and seconds <= 0:
            return False
        try:
            self._socket.settimeout(seconds)
            part = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            return False
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not part:
            raise ChannelClosed("the other side is gone")
        self._received += part
        return True


def _parse(frame: bytes) -> dict[str, Any]:
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise ChannelClosed("a frame is no JSON") from error
    if not isinstance(message, dict):
        raise ChannelClosed("a frame is no JSON object")
    return message
