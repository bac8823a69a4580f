"""Warm analyses of one kind as one CUDA graph: what took thousands of launches from Python takes one.

A small analysis on a GPU is bound by the host: the device waits for the next kernel to be asked for. So an analysis
that was made before, on inputs of the same shapes and with the same requests, is captured while it goes over a batch
once more (`torch.cuda.CUDAGraph`), and from then on replayed: the batch is copied to where the graph reads it, and the
results from where it writes them.

A replay is right because nothing that the host decided can be otherwise. What it decides by (requests, shapes, the
parameters' places, torch's settings) is in the key; what it read of the device is asked again by the graph itself, and
a replay with another answer counts for nothing (`speculation`); whoever reads in another way cannot be captured at
all, since CUDA refuses it. The batch's numbers, the parameters' and the seed are in the device's memory.

The first job of a kind never pays for it. A graph keeps its memory: of few kinds, within a share of the budget, and
until memory runs out.
"""

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from curvature_engine.execution import map_tensors, tensors_in
from curvature_engine.extensions import KroneckerFactors
from curvature_engine.formats import Inputs
from curvature_engine.kernels import choice
from curvature_engine.losses import LossSpec
from curvature_engine.orders import Order
from curvature_engine.program import Program
from curvature_engine.results import Analysis, Group
from curvature_engine.speculation import MOST_SEEDS, recording, speculates, speculating

_LOG = logging.getLogger(__name__)
RUNS = 2
"""How often an analysis is made in the ordinary way before it is captured, its first time included."""
MOST_SECONDS = 4.0
"""Analyses that take longer are not bound by launches."""
_MOST_KINDS = 256
_MOST_GRAPHS = 16
_SHARE = 4
"""All graphs of a program together may keep this part of the budget."""
_DEVICES = {"cuda"}

T = TypeVar("T")


class Analyzer(Protocol):
    """How one analysis is made."""

    def in_pieces(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """In the ordinary way, with everything that may happen."""

    def once(self, inputs: Inputs, targets: Tensor) -> Analysis:
        """As a whole, or else with an error; nobody is told of its progress."""


class Graph(Protocol):
    """Something that a device does again and again."""

    def capture(self, run: Callable[[], T]) -> T:
        """Take notice of what `run` asks of the device; the tensors it returns have their numbers after a replay."""

    def replay(self) -> None:
        """Do it once more."""


class CudaGraph:
    """A CUDA graph on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], T]) -> T:
        """See `Graph`. It runs once before, as libraries load kernels and take memory when they are first called."""
        current, stream = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                run()
            stream.synchronize()
            # Other threads may go on meanwhile, with what would spoil a capture of the whole process.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                return run()
        finally:
            torch.cuda.set_stream(current)  # which torch leaves as it is where the end of a capture fails

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


@dataclass
class _Captured:
    """A graph, with where it reads and writes.

    Attributes:
        results: every tensor of `analysis`, once.
        seeded: how the numbers in `seeds` follow from the seed.
        holds: whether what was assumed holds, after a replay.
        held: what the program keeps for its analyses, whether it goes on keeping it or not: the graph may read of it.
    """

    graph: Graph
    batch: Sequence[Tensor]
    seeds: Tensor
    staged: Tensor
    seeded: Sequence[Callable[[int], int]]
    holds: Tensor
    analysis: Analysis
    results: Sequence[Tensor]
    kept_bytes: int
    held: Sequence[Any]

    def replay(self, batch: Sequence[Tensor], seed: int) -> Analysis | None:
        """The analysis of another batch; None where it does not go the same way."""
        for place, tensor in zip(self.batch, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        if self.seeded:
            count = len(self.seeded)
            self.staged[:count] = torch.tensor([make(seed) for make in self.seeded])
            self.seeds[:count].copy_(self.staged[:count], non_blocking=True)
        self.graph.replay()
        fresh = [torch.empty_like(t) for t in self.results]
        torch._foreach_copy_(fresh, list(self.results))
        if not bool(self.holds):  # which waits; before it nothing here may be written again
            return None
        return _with_tensors(self.analysis, dict(zip(map(id, self.results), fresh, strict=True)), seed)


@dataclass
class _Kind:
    """What is known of one kind of analysis."""

    runs: int = 0
    hopeless: bool = False
    captured: _Captured | None = None
    misses: int = 0


@dataclass
class Replays:
    """The kinds of analyses that a program has met."""

    _kinds: OrderedDict[Hashable, _Kind] = field(default_factory=OrderedDict)
    _lock: Any = field(default_factory=threading.Lock)

    def analysis(self, analyzer: Analyzer, order: Order, key: Hashable, inputs: Inputs, targets: Tensor) -> Analysis:
        """An analysis by whatever way is the fastest."""
        if not self._lock.acquire(blocking=False):  # one at a time: a graph has one place for its batch
            return analyzer.in_pieces(inputs, targets)
        try:
            kind = self._kind(key)
            batch = tensors_in([inputs, targets])
            if kind.captured is not None:
                with _on(order.program.device):
                    found = kind.captured.replay(batch, order.seed)
                if found is not None:
                    _tell(order, found)
                    return found
                kind.misses += 1
                if kind.misses > 3:
                    kind.captured, kind.hopeless = None, True
            return self._ordinary(analyzer, order, kind, inputs, targets)
        finally:
            self._lock.release()

    def drop(self) -> int:
        """Let go of all graphs; how many there were."""
        kept = [kind for kind in self._kinds.values() if kind.captured is not None]
        for kind in kept:
            kind.captured, kind.runs = None, 0
        return len(kept)

    def _kind(self, key: Hashable) -> _Kind:
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _ordinary(self, analyzer: Analyzer, order: Order, kind: _Kind, inputs: Inputs, targets: Tensor) -> Analysis:
        begun = time.perf_counter()
        with recording() as answers:
            found = analyzer.in_pieces(inputs, targets)
        kind.runs += 1
        if kind.runs < RUNS or kind.hopeless or kind.captured is not None:
            return found
        if not _is_whole(found) or time.perf_counter() - begun > MOST_SECONDS:
            kind.hopeless = True
            return found
        kept_bytes = found.plan.peak_bytes
        if not self._make_room(kept_bytes, order.budget.total_bytes // _SHARE):
            return found
        try:
            with _on(order.program.device):
                kind.captured = _captured(analyzer, order, answers, inputs, targets, kept_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it was, the ordinary way is there
            _LOG.debug("an analysis cannot be captured: %s: %s", type(error).__name__, error)
            kind.hopeless = True
        return found

    def _make_room(self, needed: int, most: int) -> bool:
        """Let go of graphs that were not used for longest, until there is room for one more."""
        kept = [kind for kind in self._kinds.values() if kind.captured is not None]
        total = sum(kind.captured.kept_bytes for kind in kept if kind.captured is not None)
        if needed > most:
            return False
        for kind in kept:
            if total + needed <= most and len(kept) < _MOST_GRAPHS:
                break
            if kind.captured is not None:
                total -= kind.captured.kept_bytes
                kind.captured, kind.runs = None, 0
        return True


_OF_PROGRAMS: weakref.WeakKeyDictionary[Program, Replays] = weakref.WeakKeyDictionary()


def replays_of(program: Program) -> Replays:
    """A program's own."""
    return _OF_PROGRAMS.setdefault(program, Replays())


def drop() -> int:
    """Let go of all graphs of all programs: memory ran out. How many there were."""
    return sum(replays.drop() for replays in list(_OF_PROGRAMS.values()))


def key_of(
    order: Order, spec: LossSpec, parameters: Any, most_bytes: int | None, inputs: Inputs, targets: Tensor
) -> Hashable | None:
    """All that the host decides an analysis by; None where that is not known, or nothing can be gained."""
    program = order.program
    if program.device.type not in _DEVICES or why_off() is not None or speculates():
        return None
    if order.verify or order.part is not None or order.is_reordered or program.keeps_training:
        return None
    if not spec.is_built_in or not all(_is_built_in(request.extension.accumulator) for request in order.requests):
        return None
    try:
        return (
            _told([inputs, targets]),
            tuple((r.label, r.extension.name, _told(r.options)) for r in order.requests),
            (spec.name, _told(spec.options), spec.output, spec.reduction),
            (parameters if isinstance(parameters, str) else tuple(parameters), order.budget, most_bytes),
            tuple((t.data_ptr(), t.requires_grad) for p in program.parameters.values() for t in p.tensors),
            (torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cuda"), choice.why_off()),
            torch.get_default_dtype(),
            (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        )
    except TypeError:  # something of a kind that cannot be told
        return None


def why_off() -> str | None:
    """Why no analysis is captured in this process, or None."""
    off = os.environ.get("CURVATURE_GRAPHS", "on").lower() in ("off", "0", "no")
    return "CURVATURE_GRAPHS is off" if off else None


def _told(value: Any) -> Hashable:
    """A batch without its numbers, or an option.

    Raises:
        TypeError: it is neither.
    """
    if type(value) is Tensor:
        if value.layout != torch.strided or value.is_conj() or value.is_neg() or not value.numel():
            raise TypeError("a tensor of another kind")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _told(v)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_told, value))
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    raise TypeError(f"{type(value).__name__} in a batch")


def _is_built_in(accumulator: Any) -> bool:
    """Plug-ins may do on the host what they like."""
    return accumulator is None or accumulator.__module__.startswith("curvature_engine.")


def _is_whole(found: Analysis) -> bool:
    """Whether an analysis went as planned, in one piece, sample by sample nowhere."""
    methods = {entry["method"] for group in found.groups.values() for entry in group.provenance.values()}
    halvings = any(entry["halvings"] for group in found.groups.values() for entry in group.provenance.values())
    return found.plan.chunks == 1 and not found.plan.streamed and not halvings and "fallback" not in methods


def _captured(
    analyzer: Analyzer, order: Order, answers: list[bool], inputs: Inputs, targets: Tensor, kept_bytes: int
) -> _Captured:
    device = order.program.device
    placed_inputs, placed_targets = map_tensors(lambda t: _placed(t, device), (inputs, targets))
    batch = tensors_in([placed_inputs, placed_targets])
    staged = torch.zeros(MOST_SEEDS, dtype=torch.int64, pin_memory=device.type == "cuda")
    seeds = torch.zeros(MOST_SEEDS, dtype=torch.int64, device=device)
    graph = _graph(device)

    def run() -> tuple[Analysis, Tensor, list[Callable[[int], int]]]:
        with speculating(answers, seeds) as speculation:
            analysis = analyzer.once(placed_inputs, placed_targets)
            return analysis, speculation.holds(), speculation.seeded

    analysis, holds, seeded = graph.capture(run)
    results = list({id(t): t for t in _tensors_of(analysis)}.values())
    held = [*order.program.verdicts.held(), *order.program.derived.values()]
    return _Captured(graph, batch, seeds, staged, seeded, holds, analysis, results, kept_bytes, held)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides where they are those of a dense tensor."""
    return torch.empty_like(tensor, device=device, requires_grad=False).copy_(tensor.detach())


def _graph(device: torch.device) -> Graph:
    return CudaGraph(device)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def _tell(order: Order, found: Analysis) -> None:
    """Say that all columns are done."""
    if order.progress is not None:
        total = max(1, sum(found.plan.columns.values()))
        order.progress(total, total)


def _tensors_of(analysis: Analysis) -> list[Tensor]:
    found = [analysis.loss]
    for group in analysis.groups.values():
        found += group.tensors.values()
        for result in group.by_parameter.values():
            found += [t for t in result if t is not None] if isinstance(result, KroneckerFactors) else [result]
    return found


def _with_tensors(analysis: Analysis, fresh: Mapping[int, Tensor], seed: int) -> Analysis:
    """The same analysis with other numbers, drawn with another seed."""

    def of(result: Tensor | KroneckerFactors) -> Tensor | KroneckerFactors:
        if isinstance(result, KroneckerFactors):
            return KroneckerFactors(fresh[id(result.B)], None if result.A is None else fresh[id(result.A)])
        return fresh[id(result)]

    def of_group(group: Group) -> Group:
        return replace(
            group,
            options=dict(group.options),
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
        info={**analysis.info, "seed": seed},
    )
