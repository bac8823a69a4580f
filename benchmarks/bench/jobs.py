"""What somebody does in one run, and how to read what came of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.bench.cases import Case
from benchmarks.bench.works import Work
from torch import Tensor

Values = dict[str, Tensor | tuple[Tensor, ...]]
"""By parameter; of Kronecker factors (B, A) or (B,)."""
Results = dict[str, Values]
"""By extension."""


class Unable(Exception):
    """Somebody does not do this; the message says why in one line."""


@dataclass(frozen=True)
class Job:
    """`run` is what is timed, `read` puts its return in order, `release` drops what it left behind.

    Given labels, `run` takes them for those drawn from the model.
    """

    run: Callable[[Tensor | None], Any]
    read: Callable[[Any], Results]
    release: Callable[[], None] = lambda: None


class Peer(Protocol):
    """Makes jobs."""

    def __call__(self, case: Case, work: Work) -> Job:
        """The job.

        Raises:
            Unable: where the peer has no such thing.
        """
        ...


def reason(error: BaseException) -> str:
    """One line of what a peer said."""
    said = " ".join(str(error).split())
    text = said if isinstance(error, Unable) else f"{type(error).__name__}: {said}"
    return text if len(text) <= 160 else f"{text[:157]}…"
