"""Cursors of lists, newest first: when the last one shown was made, and its id."""

import base64
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

from curvature_service.errors import ApiError

_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_CURSOR = 200


class Listed(Protocol):
    """What lists are made of."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def created_at(self) -> datetime:
        """When it was made."""
        ...


def cursor_after(shown: Sequence[Listed], found: int) -> str | None:
    """The cursor of the next page, if more were found than are shown."""
    if found <= len(shown):
        return None
    last = shown[-1]
    return base64.urlsafe_b64encode(json.dumps([last.created_at.isoformat(), last.id]).encode()).decode()


def read_cursor(cursor: str) -> tuple[datetime, str]:
    """The (created_at, id) of the last one shown.

    Raises:
        ApiError: `invalid_request`, for a cursor that is none of ours.
    """
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError("too long")
        moment, last_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        if not _ID.fullmatch(last_id):
            raise ValueError("no id")
        return datetime.fromisoformat(moment).astimezone(UTC), last_id
    except (ValueError, TypeError, OverflowError) as error:
        raise ApiError(
            "invalid_request",
            f"the cursor {cursor[:50]!r} was not made by this server",
            param="cursor",
            remedy="pass next_cursor of the previous page, or none",
        ) from error
