"""What rules make of saved inputs, kept for the next column of the same part."""

from collections.abc import Callable, Hashable

from torch import Tensor


class Unfolded:
    """Keeps what fits.

    Args:
        limit_bytes: how much may be kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._kept: dict[Hashable, Tensor | None] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What was kept under a key, or what is made now."""
        if key in self._kept:
            return self._kept[key]
        made = make()
        nbytes = 0 if made is None else made.nbytes
        if nbytes <= self._left:
            self._left -= nbytes
            self._kept[key] = made
        return made

    def keeps(self, key: Hashable) -> bool:
        """Whether what was made under a key is kept."""
        return key in self._kept

    def has_room(self, key: Hashable, nbytes: int) -> bool:
        """Whether what takes so many bytes is kept under a key, or would be."""
        return key in self._kept or nbytes <= self._left
