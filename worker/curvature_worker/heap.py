"""Memory that a child keeps when it is freed (`launcher.KEEPING`), as long as jobs are alike."""

import ctypes
from contextlib import suppress

from curvature_engine.pages import PAGES


def give_back() -> None:
    """Return freed memory, and what waits for results, to the system."""
    PAGES.drop()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
