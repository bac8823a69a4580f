"""One tensor operator of a program, resolved to the kernel that TorchScript would call."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class OperatorCall(NamedTuple):
    """One tensor operator of the program, resolved.

    Attributes:
        writes: positions of the arguments that it edits.
    """

    name: str
    overload: Any
    positional: int
    keywords: tuple[str, ...]
    writes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: str

    def invoke(self, arguments: Sequence[Any]) -> Any:
        """Call the operator; arguments after `*` in its schema go by name."""
        if not self.keywords:
            return self.overload(*arguments)
        options = dict(zip(self.keywords, arguments[self.positional :], strict=True))
        return self.overload(*arguments[: self.positional], **options)
