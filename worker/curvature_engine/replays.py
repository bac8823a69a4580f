"""Warm analyses of one kind as one graph: what took thousands of steps of Python takes the operators alone.

A small analysis is bound by the host: a GPU waits for the next kernel to be asked for, and on a CPU up to a third of
the time goes into asking. So an analysis that was made before, on inputs of the same shapes and with the same requests,
is captured while it goes over a batch once more, and from then on replayed: on a GPU as a `torch.cuda.CUDAGraph`
(`cuda_graphs`), on a CPU as one straight function of torch's operators (`cpu_graphs`).

A replay is right because nothing that the host decided can be otherwise. What it decides by (requests, shapes, the
parameters' places, torch's settings) is in the key (`replay_keys`); what it read of the device is asked again by the
graph itself, and a replay with another answer counts for nothing (`speculation`); whoever reads in another way cannot
be captured at all. The batch's numbers, the parameters' and the seed are in the device's memory. On a CPU, where a
number can be read without anybody's notice, the first replay is compared with the ordinary way, bit for bit, as well.

The first job of a kind never pays for it. A graph keeps its memory: of few kinds, within a share of the budget, and
until memory runs out.
"""

import copy
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.cpu_graphs import CpuGraph
from curvature_engine.cuda_graphs import CudaGraph
from curvature_engine.errors import lacks_memory
from curvature_engine.execution import map_tensors, tensors_in
from curvature_engine.extensions import KroneckerFactors
from curvature_engine.formats import Inputs
from curvature_engine.orders import Order
from curvature_engine.plans import Plan
from curvature_engine.program import Program
from curvature_engine.replay_keys import Key, places_of, told_by
from curvature_engine.results import Analysis, Group
from curvature_engine.speculation import MOST_SEEDS, Unspeculative, recording, speculating

_LOG = logging.getLogger(__name__)
RUNS = {"cuda": 2, "cpu": 5}
"""How often an analysis is made in the ordinary way before it is captured, its first time included; on CPUs a capture
takes as long as a replay saves in ten or twenty times."""
MOST_SECONDS = {"cuda": 4.0, "cpu": 1.0}
"""Analyses that take longer are not bound by the host."""
MOST_GRAPHS = 32
"""Of all programs of the process."""
_MOST_KINDS = 256
_MOST_MISSES = 3
_SHARE = 4
"""All graphs of the process together may keep this part of a budget."""

T = TypeVar("T")


class Analyzer(Protocol):
    """How one analysis is made."""

    columns_done: int
    """How many columns it told of, or would."""

    def in_pieces(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """In the ordinary way, with everything that may happen."""

    def once(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """As a whole, or else with an error; nobody is told of its progress."""

    def leave_room(self, plan: Plan) -> None:
        """Have no more memory wait than what is planned leaves."""


class Graph(Protocol):
    """Something that a device does again and again: see `CudaGraph` and `CpuGraph`."""

    lends: bool
    on_trial: bool

    def capture(self, run: Callable[[], T], given: Sequence[Tensor], results: Callable[[T], Sequence[Tensor]]) -> T:
        """Take notice of what `run` asks of the device."""

    def replay(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """Do it once more with other tensors given: the results."""


@dataclass
class _Captured:
    """A graph, with what its results mean.

    Attributes:
        seeds: where a replay finds numbers that are made of the seed.
        seeded: how they follow from it.
        analysis: one without tensors' numbers: the graph gives each of its tensors, once, in order.
        held: what the program keeps for its analyses, whether it goes on keeping it or not: the graph may read of it.
        columns: that a caller is told of.
    """

    graph: Graph
    seeds: Tensor
    seeded: Sequence[Callable[[int], int]]
    analysis: Analysis
    kept_bytes: int
    held: Sequence[Any]
    columns: int

    def replay(self, batch: Sequence[Tensor], seed: int) -> Analysis | None:
        """The analysis of another batch; None where it does not go the same way."""
        if self.seeded:
            self.seeds[: len(self.seeded)] = torch.tensor([make(seed) for make in self.seeded])
        holds, *found = self.graph.replay([*batch, self.seeds])
        if self.graph.lends:
            fresh = [torch.empty_like(t) for t in found]
            torch._foreach_copy_(fresh, found)
            found = fresh
        if not bool(holds):  # which waits; before it nothing that is given may be written again
            return None
        places = map(id, _once_each(self.analysis))
        return _with_tensors(self.analysis, dict(zip(places, found, strict=True)), seed)


@dataclass
class _Kind:
    """What is known of one kind of analysis."""

    runs: int = 0
    hopeless: bool = False
    captured: _Captured | None = None
    misses: int = 0
    used: int = 0


_TABLE = threading.RLock()
"""Held while kinds are looked up, added, or let go, by whichever thread."""
_CLOCK = count(1)


@dataclass(eq=False)
class Replays:
    """The kinds of analyses that a program has met."""

    _kinds: OrderedDict[Key, _Kind] = field(default_factory=OrderedDict)
    _refused: set[Hashable] = field(default_factory=set)
    """What was asked where a capture was refused: other shapes would be, too."""
    _turn: Any = field(default_factory=threading.Lock)

    def analysis(self, analyzer: Analyzer, order: Order, key: Key, inputs: Inputs, targets: Tensor) -> Analysis:
        """An analysis by whatever way is the fastest."""
        if not self._turn.acquire(blocking=False):  # one at a time: a graph has one place for its batch
            with recording():  # not among the answers of an analysis that this one may be part of
                return analyzer.in_pieces(inputs, targets)
        try:
            kind = self._kind(key)
            captured = kind.captured
            if captured is not None and captured.graph.on_trial:
                found = self._ordinary(analyzer, order, key, kind, inputs, targets)
                self._try(analyzer, kind, captured, order, inputs, targets, found)
                return found
            if captured is not None:
                again = self._replayed(analyzer, kind, captured, order, inputs, targets)
                if again is not None:
                    if order.progress is not None:
                        order.progress(captured.columns, captured.columns)
                    return again
            return self._ordinary(analyzer, order, key, kind, inputs, targets)
        finally:
            self._turn.release()

    def _try(
        self,
        analyzer: Analyzer,
        kind: _Kind,
        captured: _Captured,
        order: Order,
        inputs: Inputs,
        targets: Tensor,
        expected: Analysis,
    ) -> None:
        """Hold a replay against the ordinary way."""
        found = self._replayed(analyzer, kind, captured, order, inputs, targets)
        if found is None:
            return
        if _are_same(found, expected):
            captured.graph.on_trial = False
            return
        _LOG.debug("a replay differs from the ordinary way")
        kind.captured, kind.hopeless = None, True

    def captured(self) -> list[_Kind]:
        """The kinds that have graphs."""
        with _TABLE:
            return [kind for kind in self._kinds.values() if kind.captured is not None]

    def _kind(self, key: Key) -> _Kind:
        with _TABLE:
            kind = self._kinds.setdefault(key, _Kind())
            self._kinds.move_to_end(key)
            while len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
            return kind

    @staticmethod
    def _replayed(
        analyzer: Analyzer, kind: _Kind, captured: _Captured, order: Order, inputs: Inputs, targets: Tensor
    ) -> Analysis | None:
        analyzer.leave_room(captured.analysis.plan)
        try:
            with _on(order.program.device), torch.no_grad():
                found = captured.replay(tensors_in([inputs, targets]), order.seed)
        except Unspeculative as error:
            _LOG.debug("a replay failed: %s", error)
            found = None
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            drop()
            _let_go(kind)
            return None
        if found is not None:
            kind.used = next(_CLOCK)
            return found
        kind.misses += 1
        if kind.misses > _MOST_MISSES:
            kind.captured, kind.hopeless = None, True
        return None

    def _ordinary(
        self, analyzer: Analyzer, order: Order, key: Key, kind: _Kind, inputs: Inputs, targets: Tensor
    ) -> Analysis:
        begun = time.perf_counter()
        with recording() as answers:
            found = analyzer.in_pieces(inputs, targets)
        seconds, device = time.perf_counter() - begun, order.program.device.type
        kind.runs += 1
        if kind.runs < RUNS[device] or kind.hopeless or kind.captured is not None or key.asked in self._refused:
            return found
        most = order.budget.total_bytes // _SHARE
        if not _is_whole(found) or seconds > MOST_SECONDS[device] or found.plan.peak_bytes > most:
            kind.hopeless = True
            return found
        try:
            with _on(order.program.device), order.program.still():
                if places_of(order.program) != key.places:
                    return found
                captured = _captured(analyzer, order, answers, inputs, targets, found.plan.peak_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it was, the ordinary way is there
            _LOG.debug("an analysis cannot be captured: %s: %s", type(error).__name__, error)
            kind.runs, kind.hopeless = 0, not lacks_memory(error)
            if _is_refusal(error):
                self._refused.add(key.asked)
        else:
            kind.captured, kind.used = captured, next(_CLOCK)
            _make_room(most)
        return found


_OF_PROGRAMS: weakref.WeakKeyDictionary[Program, Replays] = weakref.WeakKeyDictionary()


def replays_of(program: Program) -> Replays:
    """A program's own."""
    with _TABLE:
        return _OF_PROGRAMS.setdefault(program, Replays())


def drop() -> int:
    """Let go of all graphs of all programs that keep memory: it ran out. How many there were."""
    kept = [kind for kind in _all() if kind.captured is not None and kind.captured.kept_bytes]
    for kind in kept:
        _let_go(kind)
    return len(kept)


pages.RESERVES.append(drop)


def _all() -> list[_Kind]:
    with _TABLE:
        return [kind for replays in list(_OF_PROGRAMS.values()) for kind in replays.captured()]


def _let_go(kind: _Kind) -> None:
    kind.captured, kind.runs = None, 0


def _make_room(most_bytes: int) -> None:
    """Let go of graphs that were not used for longest, until the others may stay."""
    kept = sorted(_all(), key=lambda kind: kind.used)
    sizes = [kind.captured.kept_bytes if kind.captured is not None else 0 for kind in kept]
    while len(kept) > MOST_GRAPHS or (sum(sizes) > most_bytes and len(kept) > 1):
        _let_go(kept.pop(0))
        sizes.pop(0)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that something would have been read."""
    while error is not None and not isinstance(error, Unspeculative):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_whole(found: Analysis) -> bool:
    """Whether an analysis went as planned, in one piece, sample by sample nowhere."""
    entries = [entry for group in found.groups.values() for entry in group.provenance.values()]
    planned = found.plan.chunks == 1 and not found.plan.streamed and not any(entry["halvings"] for entry in entries)
    return planned and all(entry["method"] != "fallback" for entry in entries)


def _captured(
    analyzer: Analyzer, order: Order, answers: list[bool], inputs: Inputs, targets: Tensor, kept_bytes: int
) -> _Captured:
    program = order.program
    placed_inputs, placed_targets = map_tensors(lambda t: _placed(t, program.device), (inputs, targets))
    batch = tensors_in([placed_inputs, placed_targets])
    if not told_by(batch, tensors_in([inputs, targets])):
        raise Unspeculative("a batch's copy lies otherwise")
    staged = torch.zeros(MOST_SEEDS, dtype=torch.int64, pin_memory=program.device.type == "cuda")
    seeds = torch.zeros(MOST_SEEDS, dtype=torch.int64, device=program.device)
    graph = _graph(program.device)

    def run() -> tuple[Analysis, Tensor, list[Callable[[int], int]]]:
        with speculating(answers, seeds) as speculation:
            analysis = analyzer.once(placed_inputs, placed_targets)
            return analysis, speculation.holds(), speculation.seeded

    analysis, _, seeded = graph.capture(run, [*batch, seeds], lambda found: [found[1], *_once_each(found[0])])
    held = [*program.verdicts.held(), *program.derived.values(), *(t.data for t in _parameters(program))]
    return _Captured(
        graph, staged, seeded, _apart(analysis), kept_bytes if graph.lends else 0, held, analyzer.columns_done
    )


def _parameters(program: Program) -> Iterator[Tensor]:
    return (t for p in program.parameters.values() for t in p.tensors)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy, with the same strides if it is dense."""
    return torch.empty_like(tensor, device=device, requires_grad=False).copy_(tensor.detach())


def _graph(device: torch.device) -> Graph:
    return CudaGraph(device) if device.type == "cuda" else CpuGraph(device)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _tensors_of(analysis: Analysis) -> list[Tensor]:
    found = [analysis.loss]
    for group in analysis.groups.values():
        found += group.tensors.values()
        for result in group.by_parameter.values():
            found += [t for t in result if t is not None] if isinstance(result, KroneckerFactors) else [result]
    return found


def _once_each(analysis: Analysis) -> list[Tensor]:
    return list({id(t): t for t in _tensors_of(analysis)}.values())


def _are_same(found: Analysis, expected: Analysis) -> bool:
    """Whether two analyses say the same, bit for bit."""
    for label, group in expected.groups.items():
        other = found.groups[label]
        if other.provenance != group.provenance or other.missing != group.missing:
            return False
    pairs = zip(_tensors_of(found), _tensors_of(expected), strict=True)
    told = (found.info, found.warnings) == (expected.info, expected.warnings)
    return told and all(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _apart(analysis: Analysis) -> Analysis:
    """The same with plain data that is nobody else's, and tensors without numbers."""
    blank = {id(tensor): torch.empty(0) for tensor in _once_each(analysis)}
    analysis = _with_tensors(analysis, blank, analysis.info["seed"])
    groups = {
        label: replace(
            group,
            options=copy.deepcopy(group.options),
            missing=dict(group.missing),
            provenance=copy.deepcopy(group.provenance),
            aliases=dict(group.aliases),
        )
        for label, group in analysis.groups.items()
    }
    return replace(analysis, groups=groups, warnings=list(analysis.warnings), info=copy.deepcopy(dict(analysis.info)))


def _with_tensors(analysis: Analysis, fresh: Mapping[int, Tensor], seed: int) -> Analysis:
    """The same analysis with other numbers, drawn with another seed."""

    def of(result: Tensor | KroneckerFactors) -> Tensor | KroneckerFactors:
        if isinstance(result, KroneckerFactors):
            return KroneckerFactors(fresh[id(result.B)], None if result.A is None else fresh[id(result.A)])
        return fresh[id(result)]

    def of_group(group: Group) -> Group:
        return replace(
            group,
            options=copy.deepcopy(group.options),
            tensors={key: fresh[id(tensor)] for key, tensor in group.tensors.items()},
            missing=dict(group.missing),
            provenance={
                key: {**entry, "seed": None if entry["seed"] is None else seed}
                for key, entry in group.provenance.items()
            },
            aliases=dict(group.aliases),
            by_parameter={name: of(result) for name, result in group.by_parameter.items()},
        )

    return replace(
        analysis,
        loss=fresh[id(analysis.loss)],
        groups={label: of_group(group) for label, group in analysis.groups.items()},
        warnings=list(analysis.warnings),
        info={**copy.deepcopy(analysis.info), "seed": seed},
    )
