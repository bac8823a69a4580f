"""A failure as a result: time on a GPU is dear, and what else was found is worth having all the same."""

from collections.abc import Callable
from typing import Any

FAILED = "failed: "


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` gives; or its error in words, which begin with `FAILED`."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 (as said above)
        return f"{FAILED}{type(error).__name__}: {error}"


def failed(found: Any) -> bool:
    """Whether there is no result."""
    return isinstance(found, str) and found.startswith(FAILED)
