"""What a function asks of torch on a CPU, noted down once as one straight function, and done again without the rest.

A small analysis spends up to a third of its time in what decides which operators to call, and in Python. Noted are the
calls that reach torch's dispatcher below autograd: its operators, in order, with all that is no tensor as it was. A
tensor that an operator takes was made by another one, is given anew to each replay, or was there before.

So nothing may be noted of a function that decides by numbers of tensors: whoever reads them is refused, in the
dispatcher where reads come through it, and at the functions of torch that read past it. Nor may anything that was there
before be written, since it stays.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from curvature_engine import pages
from curvature_engine.dispatch_modes import DispatchMode
from curvature_engine.errors import lacks_memory
from curvature_engine.speculation import Unspeculative

T = TypeVar("T")
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
"""Has operators pass by what is autograd's at once; torch's own, of which it promises nothing."""
aten = torch.ops.aten
MOST_STEPS = 20_000
"""Of one function: what takes more is not bound by Python."""
_REFUSED = {
    torch.Tag.data_dependent_output,  # the host reads
    torch.Tag.dynamic_output_shape,  # shapes that the host would know
    torch.Tag.nondeterministic_seeded,
    torch.Tag.inplace_view,
}
_RESHAPING = {
    aten.as_strided_.default,
    aten.squeeze_.default,
    aten.squeeze_.dim,
    aten.t_.default,
    aten.transpose_.default,
    aten.unsqueeze_.default,
}
"""Those that give a tensor another shape in place, and nothing else."""
_SAME = {aten.detach.default, aten.alias.default}
_VIEWS = {
    aten.as_strided.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Those that are left out where nobody takes what they give."""
_READERS = {"tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__format__"}
_TAKERS_OF_NUMBERS = {"tensor", "as_tensor", "asarray", "scalar_tensor"}


class CpuGraph:
    """A function's operators, to be done again.

    Attributes:
        lends: whether what a replay returns is written again by the next one.
        on_trial: whether nobody has compared a replay with the function yet.
    """

    lends = False

    def __init__(self, device: torch.device) -> None:
        self.on_trial = True
        self._function: Callable[[list[Tensor]], list[Tensor]]

    def capture(self, run: Callable[[], T], given: Sequence[Tensor], results: Callable[[T], Sequence[Tensor]]) -> T:
        """Take notice of what `run` asks of torch.

        Args:
            run: what is noted.
            given: tensors for which others, of the same shapes and strides, come in a replay.
            results: the tensors in what `run` returns that a replay is to make.

        Raises:
            Unspeculative: it reads numbers, or does what cannot be noted.
        """
        notes = _Notes(given)
        with ExitStack() as stack:
            stack.enter_context(pages.told_to(notes.made))
            stack.enter_context(_NoReading())
            stack.enter_context(notes)
            found = run()
        self._function = notes.function(results(found))
        return found

    def replay(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results with other tensors given.

        Raises:
            Unspeculative: an operator failed, and why is the ordinary way's to say.
        """
        try:
            with torch.no_grad(), _below_autograd():
                return self._function([t if t.storage_offset() == 0 else t.clone() for t in given])
        except Exception as error:
            if lacks_memory(error):
                raise
            raise Unspeculative(f"an operator failed: {error}") from error


@dataclass(frozen=True)
class _Slot:
    """In place of a tensor."""

    number: int


@dataclass(frozen=True)
class _Step:
    """One call: `outputs` are slots, or None where nothing new comes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    outputs: Any
    taken: tuple[int, ...]


class _NoReading(TorchFunctionMode):
    """Refuses the functions of torch that read a tensor past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _READERS or (name in _TAKERS_OF_NUMBERS and _holds_tensors([*args, *kwargs.values()])):
            raise Unspeculative(f"{name} reads a tensor")
        return func(*args, **kwargs)


@dataclass(eq=False)
class _Notes(DispatchMode):
    """Notes operators down, in order."""

    given: Sequence[Tensor]
    _steps: list[_Step] = field(default_factory=list)
    _there: dict[int, Tensor] = field(default_factory=dict)
    """By slot: what was there before."""
    _slots: dict[int, tuple["ref[Tensor]", int]] = field(default_factory=dict)
    """By a tensor's id, which is nobody else's as long as the tensor lives."""
    _memory: dict[int, tuple[StorageWeakRef, int, torch.dtype, bool]] = field(default_factory=dict)
    """By a storage's address: the storage, a slot whose tensor lies in it, and whether it was there before."""
    _shared: set[int] = field(default_factory=set)
    """Slots that stand for several tensors."""
    _number: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for tensor in self.given:
            self._enter(tensor, foreign=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RESHAPING:
            _check(func, args, kwargs)
        taken: list[int] = []
        arguments = tuple(self._noted(a, taken) for a in args)
        named = {name: self._noted(a, taken) for name, a in kwargs.items()}
        for place, name in _written(func):
            self._check_own(func, args[place] if place < len(args) else kwargs.get(name))
        if func in _RESHAPING and taken[0] in self._shared:
            raise Unspeculative(f"{func} is for one of two tensors that are one here")
        result = func(*args, **kwargs)
        if func in _SAME:
            self._slots[id(result)] = ref(result), taken[0]
            self._shared.add(taken[0])
        elif func is aten.lift_fresh.default:
            self._has_numbers(result)
        else:
            self._add(func, arguments, named, result, taken)
        return result

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns: memory in which anything may stand, which no operator of torch made."""
        found = make()
        self._add(make, (), {}, found, [])
        return found

    def _has_numbers(self, tensor: Tensor) -> None:
        """Note a tensor that was made of the host's numbers: each replay has its own, which may be written."""
        there, self._number = self._number, self._number + 1
        self._there[there] = tensor.clone()
        self._slots[id(tensor)] = ref(tensor), self._copied(there)
        storage = _storage(tensor)
        self._memory[storage._cdata] = _weakly(storage), self._number - 1, tensor.dtype, False

    def _copied(self, slot: int) -> int:
        self._steps.append(_Step(aten.clone.default, (_Slot(slot),), {}, _Slot(self._number), (slot,)))
        self._number += 1
        return self._number - 1

    def function(self, results: Sequence[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        """All of it as one function from what is given to the results."""
        wanted: list[int] = []
        for tensor in results:
            slot = self._slot(tensor, [])
            if self._memory[_storage(tensor)._cdata][3]:  # a result is the caller's own
                slot = self._copied(slot)
            wanted.append(slot)
        return _compiled(_needed(self._steps, wanted), len(self.given), self._there, wanted)

    def _add(
        self, function: Callable[..., Any], arguments: Any, named: dict[str, Any], result: Any, taken: list[int]
    ) -> None:
        if len(self._steps) == MOST_STEPS:
            raise Unspeculative(f"it takes more than {MOST_STEPS} operators")
        self._steps.append(_Step(function, arguments, named, self._new(result), tuple(taken)))

    def _noted(self, value: Any, taken: list[int]) -> Any:
        """A value with slots for tensors."""
        if isinstance(value, Tensor):
            return _Slot(self._slot(value, taken))
        if isinstance(value, list | tuple):
            return [self._noted(v, taken) for v in value]
        if isinstance(value, torch.UntypedStorage | torch.Generator):
            raise Unspeculative("an operator takes what is no tensor and changes")
        return value

    def _slot(self, tensor: Tensor, taken: list[int]) -> int:
        """Where a tensor comes from."""
        found = self._slots.get(id(tensor))
        slot = found[1] if found is not None and found[0]() is tensor else self._unknown(tensor)
        taken.append(slot)
        return slot

    def _unknown(self, tensor: Tensor) -> int:
        """A slot for what no operator returned: another view of known memory, or what was there before."""
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise Unspeculative(f"a {type(tensor).__name__}")
        known = self._memory.get(_storage(tensor)._cdata)
        if known is None or _is_gone(known[0]):
            slot = self._enter(tensor, foreign=True)
            self._there[slot] = tensor.detach()
            return slot
        _, slot, dtype, _ = known
        if dtype != tensor.dtype or tensor.is_conj() or tensor.is_neg():
            raise Unspeculative("memory is taken for numbers of another kind")
        place = list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
        self._add(aten.as_strided.default, (_Slot(slot), *place), {}, tensor, [slot])
        return self._number - 1

    def _new(self, result: Any) -> Any:
        """The slots of a result, None for what is no tensor or was known."""
        if isinstance(result, list | tuple):
            return [self._new(r) for r in result]
        if not isinstance(result, Tensor):
            return None
        found = self._slots.get(id(result))
        known = found is not None and found[0]() is result
        return None if known else _Slot(self._enter(result, foreign=False))

    def _enter(self, tensor: Tensor, *, foreign: bool) -> int:
        slot, self._number = self._number, self._number + 1
        self._slots[id(tensor)] = ref(tensor), slot
        storage = _storage(tensor)
        known = self._memory.get(storage._cdata)
        if known is None or _is_gone(known[0]):
            self._memory[storage._cdata] = _weakly(storage), slot, tensor.dtype, foreign
        return slot

    def _check_own(self, func: Any, targets: Any) -> None:
        for target in targets if isinstance(targets, list | tuple) else [targets]:
            if isinstance(target, Tensor) and self._memory[_storage(target)._cdata][3]:
                raise Unspeculative(f"{func} writes what was there before")


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    if tensor.layout != torch.strided:
        raise Unspeculative(f"a tensor's layout is {tensor.layout}")
    return tensor.untyped_storage()


def _weakly(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _check(func: Any, args: Sequence[Any], named: dict[str, Any]) -> None:
    refused = _REFUSED.intersection(func.tags)
    if func is aten.index.Tensor and not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return  # whole numbers give shapes that are known
    if refused == {torch.Tag.nondeterministic_seeded} and _drops_nothing(func, args, named):
        return
    if refused or func.namespace not in ("aten", "prims"):
        raise Unspeculative(f"{func} cannot be noted: {', '.join(str(tag) for tag in refused) or 'it is no operator'}")


def _drops_nothing(func: Any, args: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether all that an operator could draw is what it drops, and that is nothing: attention's."""
    places = {a.name: place for place, a in enumerate(func._schema.arguments)}
    place = places.get("dropout_p")
    return place is not None and (args[place] if place < len(args) else named.get("dropout_p", 0.0)) == 0.0


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that an operator writes."""
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _holds_tensors(values: Any) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, list | tuple) and _holds_tensors(v)) for v in values)


def _needed(steps: Sequence[_Step], wanted: Sequence[int]) -> list[_Step]:
    """Without the views that nobody takes."""
    needed, kept = set(wanted), []
    for step in reversed(steps):
        if step.function not in _VIEWS or any(slot in needed for slot in _slots_in(step.outputs)):
            needed.update(step.taken)
            kept.append(step)
    return kept[::-1]


def _compiled(
    steps: Sequence[_Step], given: int, there: dict[int, Tensor], wanted: Sequence[int]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """One function without branches; a tensor goes after the last step that takes it."""
    names: dict[str, Any] = {f"t{slot}": tensor for slot, tensor in there.items()}
    stays, seen, ends = {*there, *wanted}, set[int](), []
    for step in reversed(steps):
        here = {*step.taken, *_slots_in(step.outputs)} - seen - stays
        seen |= here
        ends.append(sorted(here))
    lines = [f"    {''.join(f't{slot}, ' for slot in range(given))} = given"] if given else []
    for number, (step, done) in enumerate(zip(steps, reversed(ends), strict=True)):
        names[f"f{number}"] = step.function
        called = [_text(a, names) for a in step.arguments]
        called += [f"{name}={_text(a, names)}" for name, a in step.named.items()]
        target = _target(step.outputs)
        lines.append(f"    {f'{target} = ' if target else ''}f{number}({', '.join(called)})")
        spent = [f"t{slot}" for slot in done] + (["_"] if "_" in target else [])
        if spent:
            lines.append(f"    {' = '.join(spent)} = None")
    lines.append(f"    return [{', '.join(f't{slot}' for slot in wanted)}]")
    # Nothing of the text comes from outside: names are numbers, and all else stands for an object in `names`.
    exec("\n".join(["def replay(given):", *lines]), names)
    found: Callable[[list[Tensor]], list[Tensor]] = names["replay"]
    return found


def _text(value: Any, names: dict[str, Any]) -> str:
    if isinstance(value, _Slot):
        return f"t{value.number}"
    if isinstance(value, list):
        return f"[{', '.join(_text(v, names) for v in value)}]"
    if value is None or type(value) in (bool, int):
        return repr(value)
    name = f"k{len(names)}"
    names[name] = value
    return name


def _target(outputs: Any) -> str:
    """What is assigned to; nothing where nothing new comes."""
    if isinstance(outputs, list):
        targets = [_target(o) or "_" for o in outputs]
        return f"({''.join(f'{t}, ' for t in targets)})" if any(t != "_" for t in targets) else ""
    return "" if outputs is None else f"t{outputs.number}"


def _slots_in(outputs: Any) -> list[int]:
    if isinstance(outputs, list):
        return [slot for o in outputs for slot in _slots_in(o)]
    return [] if outputs is None else [outputs.number]
