"""What a confined process says and leaves behind, believed no further than it is checked."""

from pathlib import Path
from typing import Any

from curvature_protocol.errors import FAMILIES
from curvature_worker.errors import JobRefused
from curvature_worker.launcher import Confined
from curvature_worker.sealing import FileInUse

_MESSAGE_CHARACTERS = 4000


def take(process: Confined, name: str) -> Path:
    """Take a file that a process announced.

    Raises:
        JobRefused: `internal_error` if it is not there, or the process can still change it.
    """
    try:
        return process.take(name)
    except FileNotFoundError as error:
        raise JobRefused("internal_error", f"the model's process left no file {name}") from error
    except FileInUse as error:
        raise JobRefused("internal_error", f"the model's process kept hold of what it left: {error}") from error


def refusal_of(reply: dict[str, Any]) -> JobRefused:
    """A child's complaint; of a code that the protocol does not know nothing is believed but the words."""
    code, needed = reply.get("code"), reply.get("needed_bytes")
    return JobRefused(
        code if isinstance(code, str) and code in FAMILIES else "internal_error",
        text_of(reply, "message") or "the model's process gave no reason",
        param=text_of(reply, "param"),
        remedy=text_of(reply, "remedy"),
        needed_bytes=needed if isinstance(needed, int) and 0 < needed < 2**63 else None,
    )


def text_of(message: dict[str, Any], field: str) -> str | None:
    """A text that a confined process sent, if it is one, and not endlessly long."""
    value = message.get(field)
    return value[:_MESSAGE_CHARACTERS] if isinstance(value, str) else None
