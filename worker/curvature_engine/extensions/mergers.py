"""How states of a data set's parts become the whole's result, key by key.

What an accumulator leaves of a part is its *state*: tensors by the keys of the result, and beside a key what merging
takes of more, its companions, as `{key}#{name}`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

State = dict[str, Tensor]
"""One key's tensors: its own under "", companions by name. Whoever joins states may edit the first of them."""

OWN = ""


class Merger(ABC):
    """Joins the states of parts in their order.

    Attributes:
        companions: the names of companions that keys may have.
        gathers: whether `gather` makes the result of what all keys gave; each of them is small then.
    """

    companions: ClassVar[tuple[str, ...]] = ()
    gathers: ClassVar[bool] = False

    @abstractmethod
    def join(self, before: State, N: int, state: State, n: int) -> State:
        """The state of the N samples before and those n of the next part together."""

    def result(self, state: State, N: int) -> Tensor:
        """A key's result from the state of all N samples, before its division by a power of Z."""
        return state[OWN]

    def gather(self, results: Mapping[str, Tensor], N: int) -> dict[str, Tensor]:
        """The extension's result by key, from those of all keys."""
        return dict(results)


class Sum(Merger):
    """Results of parts add up."""

    def join(self, before: State, N: int, state: State, n: int) -> State:
        before[OWN] += state[OWN]
        return before


def companion(key: str, name: str) -> str:
    """The key under which a companion is stored."""
    return f"{key}#{name}"
