"""The whole of a data set from what its parts left: states joined part after part, in their order.

In memory are one block of the result and one part's share of it at a time: files are opened as they are needed, and
every tensor is written as soon as it is whole.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from curvature_engine.extensions import KroneckerFactors
from curvature_engine.extensions.mergers import OWN, Merger, State, companion
from curvature_engine.losses.base import without_terms
from curvature_engine.orders import Progress
from curvature_engine.parts import LabelMerging, check_mergeable, plan_merging, whole_batch_required
from curvature_engine.provenance import misfit, of_all, of_data_set
from curvature_engine.requests import Request, parse_requests
from curvature_engine.results import Appended, Group
from curvature_engine.stores import DTYPES, NAMES, Layout, ResultStore, TensorFile, open_tensors

_BLOCK_BYTES = 2**26
"""Of state that is joined at a time, so that a file is not opened once per tensor."""

NamedLayout = Mapping[str, tuple[Sequence[int], str]]
"""Key → (shape, number format as safetensors names it)."""


@dataclass(frozen=True)
class PartGroup:
    """What one request left of one part.

    Attributes:
        missing: parameter → why it has no entry.
        provenance: key → how the tensor came to be, for every key of the state.
        path: the safetensors file that holds the state.
        layout: in place of the file, which tensors it holds; enough for rows, which stay where they are.
    """

    missing: Mapping[str, str]
    provenance: Mapping[str, Mapping[str, Any]]
    path: Path | None = None
    layout: NamedLayout | None = None

    def tensors(self) -> TensorFile:
        """The state's tensors."""
        if self.path is None:
            raise misfit("a part's state has no file")
        return open_tensors(self.path)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Key → (shape, number format), of all tensors."""
        if self.layout is not None:
            return {key: (tuple(shape), dtype) for key, (shape, dtype) in self.layout.items()}
        return {key: (place.shape, NAMES[place.dtype]) for key, place in self.tensors().places.items()}


@dataclass(frozen=True)
class PartResult:
    """What one part of a data set left.

    Attributes:
        loss: the sum over the part; None where it is not finite.
        info: that of the part's analysis.
        groups: by label.
        warnings: those of the part's analysis.
    """

    loss: float | None
    info: Mapping[str, Any]
    groups: Mapping[str, PartGroup]
    warnings: Sequence[str] = ()


@dataclass
class Merged:
    """The result of a request on a data set.

    Attributes:
        loss: L.
        groups: label → group.
        warnings: what the caller should know.
        info: as of an analysis, and `samples` N, `parts` their number.
    """

    loss: float
    groups: dict[str, Group] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)


def merge(
    extensions: Any,
    parts: Sequence[PartResult],
    *,
    results_dir: Path | None = None,
    progress: Progress | None = None,
) -> Merged:
    """The result of a request on a whole data set.

    Args:
        extensions: as the parts were analyzed with.
        parts: all of them, in their order.
        results_dir: a folder for the tensors of merged groups, one file `{label}.safetensors` each; without one they
            stay in memory.
        progress: called with (tensors joined, tensors in all), of all parts.

    Raises:
        EngineError: `whole_batch_required`, `invalid_targets`, `invalid_inputs`, and `internal_error` where parts do
            not fit together.
    """
    if not parts:
        raise misfit("there are no parts")
    plan_merging(extensions, reduction=parts[0].info["reduction"])
    requests = parse_requests(extensions)
    info, warnings = of_data_set([part.info for part in parts])
    if info["Z_under_mean"] == 0.0:
        raise without_terms()
    del info["Z_under_mean"]
    for text in (text for part in parts for text in part.warnings):
        if text not in warnings:
            warnings.append(text)
    loss = sum(nan if part.loss is None else part.loss for part in parts) / info["Z"]
    if not isfinite(loss) and all(part.loss is not None for part in parts):
        warnings.append(f"the loss is {loss}: results that depend on it are not finite")
    work = _Merging(requests, parts, info, results_dir, progress)
    return Merged(loss, work.groups(), warnings, info)


class _Merging:
    def __init__(
        self,
        requests: Sequence[Request],
        parts: Sequence[PartResult],
        info: Mapping[str, Any],
        results_dir: Path | None,
        progress: Progress | None,
    ) -> None:
        self._requests, self._parts, self._info = requests, parts, info
        self._folder, self._progress = results_dir, progress
        self._plans = check_mergeable(requests, info["reduction"])
        self._sizes = [int(part.info["part"]["samples"]) for part in parts]
        self._done, self._total = 0, 0

    def groups(self) -> dict[str, Group]:
        """Every label's group."""
        found = {request.label: self._group(request) for request in self._requests}
        states = {
            label: _state_of(group, self._plans[label].merger, self._shares(label)[0])
            for label, group in found.items()
            if self._plans[label].merger is not None
        }
        self._total = len(self._parts) * sum(len(state.keys) for state in states.values())
        for label, group in found.items():
            if label in states:
                self._merge(group, states[label], self._plans[label])
            else:
                self._append(group, self._plans[label])
        return found

    def _shares(self, label: str) -> list[PartGroup]:
        return [part.groups[label] for part in self._parts]

    def _group(self, request: Request) -> Group:
        shares = self._shares(request.label)
        missing: dict[str, str] = {}
        for share in shares:
            for parameter, reason in share.missing.items():
                missing.setdefault(parameter, reason)
        return Group(
            request.label,
            request.extension.name,
            request.options,
            request.extension.kind,
            request.convention,
            missing=missing,
            aliases=dict(self._info["aliases"]),
        )

    def _provenance(self, group: Group, keys: Sequence[str], source: Mapping[str, Sequence[str]]) -> None:
        """How every tensor came to be, in all parts; `source` says which keys of the states it was made of."""
        shares = self._shares(group.label)
        for key in keys:
            entries = [share.provenance[name] for share in shares for name in source[key]]
            group.provenance[key] = of_all(entries, self._info)

    # Rows

    def _append(self, group: Group, plan: LabelMerging) -> None:
        axis, shapes = plan.axis, [share.shapes() for share in self._shares(group.label)]
        whole: dict[str, tuple[tuple[int, ...], str]] = {}
        for key in _in_order(self._shares(group.label)[0], shapes[0]):
            if _parameter_of(key, group.kind) in group.missing:
                continue
            found = [of_part.get(key) for of_part in shapes]
            for place, each in enumerate(found):
                self._check_rows(group.label, key, axis, place, found[0], each)
            shape, dtype = shapes[0][key]
            whole[key] = ((*shape[:axis], sum(self._sizes), *shape[axis + 1 :]), dtype)
        group.appended = Appended(axis, plan.factor(self._info["Z"]), whole)
        self._provenance(group, list(whole), {key: [key] for key in whole})

    def _check_rows(self, label: str, key: str, axis: int, place: int, first: Any, found: Any) -> None:
        if found is None or first is None or len(found[0]) <= axis or found[0][axis] != self._sizes[place]:
            raise misfit(f"{label}'s {key} has not the rows of part {place}")
        rest = [(*shape[:axis], *shape[axis + 1 :]) for shape, _ in (first, found)]
        if rest[0] != rest[1] or first[1] != found[1]:
            raise whole_batch_required(
                label,
                f"{label}'s {key} has rows of different shapes: {list(first[0])} in part 0, {list(found[0])} in part "
                f"{place}",
                f"bring the parts' inputs to one shape, or leave {label} out",
            )

    # States

    def _merge(self, group: Group, state: "_StateLayout", plan: LabelMerging) -> None:
        assert plan.merger is not None
        results = self._joined(group, state, plan)
        if plan.merger.gathers:
            gathered = plan.merger.gather(dict(results), sum(self._sizes))
            keys = {key: list(state.keys) for key in gathered}
            self._keep(group, iter(gathered.items()), {k: (tuple(t.shape), t.dtype) for k, t in gathered.items()})
        else:
            keys = {key: [key] for key in state.keys}
            self._keep(group, results, {key: state.layout[key] for key in state.keys})
        self._provenance(group, list(keys), keys)

    def _keep(self, group: Group, results: Iterator[tuple[str, Tensor]], layout: Layout) -> None:
        """Put results where they belong: into a file as they come, or into memory."""
        tensors: MutableMapping[str, Tensor]
        if self._folder is None:
            tensors = dict(results)
        else:
            store = ResultStore(self._folder, {group.label: layout})
            try:
                for key, tensor in results:
                    slab = store.slab(group.label, key, tensor.shape, 0, layout[key][1], tensor.device)
                    slab.write((0,), tensor.unsqueeze(0))
                store.close()
            except BaseException:
                store.discard()
                raise
            tensors = group.file = store.files[group.label]
        group.tensors = tensors
        if group.kind == "factors":
            names = [key.removesuffix("/B") for key in tensors if key.endswith("/B")]
            group.by_parameter = {n: KroneckerFactors(tensors[f"{n}/B"], tensors.get(f"{n}/A")) for n in names}
        elif group.kind == "parameters":
            group.by_parameter = tensors

    def _joined(self, group: Group, state: "_StateLayout", plan: LabelMerging) -> Iterator[tuple[str, Tensor]]:
        """Every key's result."""
        merger, N, Z = plan.merger, sum(self._sizes), self._info["Z"]
        assert merger is not None
        for block in state.blocks(_BLOCK_BYTES):
            joined: dict[str, State] = {}
            before = 0
            for place, (share, n) in enumerate(zip(self._shares(group.label), self._sizes, strict=True)):
                file = share.tensors()
                for key in block:
                    found = state.read(file, key, group.label, place)
                    joined[key] = (
                        merger.join(joined[key], before, found, n)
                        if before
                        else {name: tensor.clone() for name, tensor in found.items()}
                    )
                    self._advance()
                before += n
            for key in block:
                result = merger.result(joined.pop(key), N)
                carries = plan.degree != 0.0 and not (group.kind == "factors" and key.endswith("/A"))
                yield key, result / Z**plan.degree if carries and Z != 1.0 else result

    def _advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class _StateLayout:
    """The keys of a state that have results, in order; and all its tensors."""

    keys: Mapping[str, tuple[str, ...]]
    """Key → the names of its companions."""
    layout: Layout

    def read(self, file: TensorFile, key: str, label: str, place: int) -> State:
        """A key's state in a part's file."""
        names = {OWN: key, **{name: companion(key, name) for name in self.keys[key]}}
        for stored in names.values():
            claimed = file.places.get(stored)
            if claimed is None or (claimed.shape, claimed.dtype) != self.layout[stored]:
                raise misfit(f"{label}'s {stored} is not in part {place} as it is in part 0")
        return {name: file[stored] for name, stored in names.items()}

    def blocks(self, block_bytes: int) -> Iterator[list[str]]:
        """The keys, as many at a time as have so many bytes, or one."""
        block: list[str] = []
        held = 0
        for key, names in self.keys.items():
            stored = (key, *(companion(key, name) for name in names))
            nbytes = sum(prod(self.layout[s][0]) * self.layout[s][1].itemsize for s in stored)
            if block and held + nbytes > block_bytes:
                yield block
                block, held = [], 0
            block.append(key)
            held += nbytes
        if block:
            yield block


def _state_of(group: Group, merger: Merger | None, share: PartGroup) -> _StateLayout:
    """What of a first part's state has results."""
    assert merger is not None
    shapes = share.shapes()
    ordered = _in_order(share, shapes)
    beside = {companion(key, name): (key, name) for key in ordered for name in merger.companions}
    keys: dict[str, tuple[str, ...]] = {}
    for key in ordered:
        if key not in beside and _parameter_of(key, group.kind) not in group.missing:
            keys[key] = tuple(name for name in merger.companions if companion(key, name) in shapes)
    return _StateLayout(keys, {key: (shape, DTYPES[dtype]) for key, (shape, dtype) in shapes.items()})


def _in_order(share: PartGroup, shapes: Mapping[str, Any]) -> list[str]:
    """The keys in the model's order, which the provenance keeps; a file's own is another."""
    if set(share.provenance) != set(shapes):
        raise misfit("a part holds other tensors than its provenance says")
    return list(share.provenance)


def _parameter_of(key: str, kind: str) -> str:
    return key.rpartition("/")[0] if kind == "factors" else key
