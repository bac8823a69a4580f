"""Gradients at the taps, each handed over while the backward pass is under way, and let go before the next comes.

All of a column's gradients at once are as large as the forward pass's graph: memory that has to be fetched, cleared,
and read again when it has left the caches. A node of the graph shows what arrived at it just before it goes on
(`register_prehook`); only where the way ends does autograd itself have to keep what arrives.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature_engine.errors import EngineError
from curvature_engine.tape import Tap, backward

LEAST_BYTES = 2**23
"""Of gradients at the taps: fewer stay in a CPU's cache, and take less than looking for where the way ends."""

Receive = Callable[[int, Tensor | None], None]
"""Takes a tap's number and the gradient of its output; None where nothing arrived."""


class Stream:
    """The way from some node back to taps, and maybe to leaves.

    Only for one thread, as autograd works on CPUs: on others hooks would run beside each other.

    Args:
        start: where cotangents go in.
        taps: number → tap; the first edge counts.
        leaves: tensors whose gradients are wanted, too.

    Attributes:
        last: numbers of the taps at which the way ends: their gradients come when all others have.
    """

    def __init__(self, start: GradientEdge, taps: Mapping[int, Tap], leaves: Sequence[Tensor] = ()) -> None:
        self._taps, self._leaves = taps, leaves
        nodes = {tap.edges[0].node for tap in taps.values()}
        passed = nodes & _leading_on(start.node, nodes | {get_gradient_edge(leaf).node for leaf in leaves})
        self._passed: dict[Node, list[int]] = {}
        self.last: list[int] = []
        for number, tap in taps.items():
            node = tap.edges[0].node
            if node in passed:
                self._passed.setdefault(node, []).append(number)
            else:
                self.last.append(number)

    def back(
        self, start: Tensor | GradientEdge, cotangent: Tensor, receive: Receive, *, last: bool = False
    ) -> list[Tensor | None]:
        """Send a cotangent back; every tap's gradient is received once. Returns the leaves' gradients.

        Of the `last` one's graph goes what it has passed: gradients behind lie in that memory.

        Raises:
            EngineError: as `backward`; or whatever `receive` raises.
        """
        ends = [self._taps[number].edges[0] for number in self.last]
        waiting = {number for numbers in self._passed.values() for number in numbers}
        failures: list[BaseException] = []

        def receiving(numbers: Sequence[int]) -> Callable[[Sequence[Any]], None]:
            def hook(gradients: Sequence[Any]) -> None:
                try:
                    for number in numbers:
                        waiting.remove(number)
                        receive(number, self._shaped(number, gradients[self._taps[number].edges[0].output_nr]))
                except BaseException as error:
                    failures.append(error)
                    raise

            return hook

        with _hooked({node: receiving(numbers) for node, numbers in self._passed.items()}):
            try:
                found = backward(start, [*ends, *self._leaves], cotangent, last=last)
            except Exception:
                if not failures:
                    raise
                error = failures.pop()  # as it was: autograd's own errors have another meaning
                raise error from None
        if waiting:  # never expected: a node before the end of the way goes on to it
            names = ", ".join(sorted(self._taps[number].parameters for number in waiting))
            raise EngineError(
                "verification_failed",
                f"the backward pass did not come by the layers of {names}; no result is given",
                param=names,
                remedy="please report this model",
            )
        for number in self.last:
            receive(number, self._shaped(number, found.pop(0)))
        return found

    def _shaped(self, number: int, gradient: Tensor | None) -> Tensor | None:
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.to_dense()
        return self._taps[number].shaped([gradient])[0]


class Arrivals:
    """Waits for all taps of a parameter, and lets go of every gradient as soon as nobody waits for it.

    Args:
        waits: parameter → its taps' numbers; of parameters that are complete at once, the first comes first.
        ready: takes a parameter, and gradients by their taps' numbers, its own among them.
        done: is told the number of every tap that nobody waits for any more.
    """

    def __init__(
        self,
        waits: Mapping[str, Collection[int]],
        ready: Callable[[str, dict[int, Tensor | None]], None],
        done: Callable[[int], None],
    ) -> None:
        self._waits = {name: set(numbers) for name, numbers in waits.items()}
        self._ready, self._done = ready, done
        self._missing = {name: len(numbers) for name, numbers in self._waits.items()}
        self._users: dict[int, list[str]] = {}
        for name, numbers in self._waits.items():
            for number in numbers:
                self._users.setdefault(number, []).append(name)
        self._gradients: dict[int, Tensor | None] = {}
        self._left = {number: len(names) for number, names in self._users.items()}

    def receive(self, number: int, gradient: Tensor | None) -> None:
        """Take a tap's gradient; each comes once."""
        self._gradients[number] = gradient
        del gradient
        for name in self._users[number]:
            self._missing[name] -= 1
            if not self._missing[name]:
                self._ready(name, self._gradients)
                for other in self._waits[name]:
                    self._left[other] -= 1
                    if not self._left[other]:
                        del self._gradients[other]
                        self._done(other)


@contextmanager
def _hooked(hooks: Mapping[Node, Callable[[Sequence[Any]], None]]) -> Iterator[None]:
    """Have nodes show what arrives at them, as long as it lasts."""
    handles = []
    try:
        for node, hook in hooks.items():
            handles.append(node.register_prehook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leading_on(start: Node, marked: Collection[Node]) -> set[Node]:
    """Nodes at or behind `start` from which the way back goes on to some that are marked."""
    leads: dict[Node, bool] = {start: False}
    waiting = [(start, iter(start.next_functions))]
    while waiting:
        node, further = waiting[-1]
        for source, _ in further:
            if source is None:
                continue
            if source not in leads:
                leads[source] = False
                waiting.append((source, iter(source.next_functions)))
                break
            if leads[source] or source in marked:
                leads[node] = True
        else:
            waiting.pop()
            if waiting and (leads[node] or node in marked):
                leads[waiting[-1][0]] = True
    return {node for node, found in leads.items() if found}
