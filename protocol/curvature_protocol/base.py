"""What every message has in common."""

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """A value that crosses the wire: immutable, and strict about fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Reply(BaseModel):
    """A message from server to client: fields added by a newer server are ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")
