"""Why a file is not admitted."""

from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a file is not admitted, and what to do."""

    message: str
    remedy: str
