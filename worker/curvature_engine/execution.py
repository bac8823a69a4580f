"""One run of a compiled program: the value table, and what is noticed on the way."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.contexts import ScriptContext
from curvature_engine.errors import EngineError, TooLarge, first_line, memory_ran_out
from curvature_engine.layouts import ChannelsLast
from curvature_engine.openings import OPENINGS, Elementary
from curvature_engine.operators import HOST_READERS, ROUTERS
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.speculation import Unspeculative, reads, speculates
from curvature_engine.sums import Sums
from curvature_engine.tape import Tape, shallow_tensors

Decision = bool | int


_BATCH_NORMS = dict.fromkeys(
    ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"), 5
)
_GROUP_NORMS = frozenset(("group_norm", "native_group_norm"))
_DROPOUTS = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "feature_alpha_dropout": 2}
_RECURRENT = {"lstm": (5, 6), "gru": (5, 6), "rnn_tanh": (5, 6), "rnn_relu": (5, 6)}


@dataclass
class Run:
    """The state of one forward pass.

    `tainted` says per slot whether a value depends on the batch (through tensors; shapes and numbers do not count).
    """

    device: torch.device
    tape: Tape | None
    edits: bool
    """Whether tensors may be edited in place: then the program works on copies of whatever outlives the run."""
    parameter_places: frozenset[int]
    """Where parameters lie in memory."""
    allow_dropout: bool
    limit_bytes: int | None = None
    """How much results may take in all; None for any amount."""
    most_rounds: int | None = None
    """How often loops may go round in all; None for any number."""
    lean: bool = False
    """Whether values go as soon as no later step reads them: for runs without a graph."""
    summed: bool = False
    """Whether sums of all that the operators make of the batch are kept."""
    layout: ChannelsLast | None = None
    """How images lie in memory, if not as the program was written for."""

    def __post_init__(self) -> None:
        self.values: list[Any] = []
        self.tainted: list[bool] = []
        self.decisions: list[Decision] = []
        self.readings: list[Any] = []
        self.sums: list[Sums] = []
        """Numbers read from the batch's tensors that are not decisions."""
        self.routed_by_data = False
        self.used_dropout = False
        self.rounds = 0
        """How often loops went round."""
        self.kept_bytes = 0
        """What the operators' results take: about what a graph keeps of them."""
        self._overlay: dict[tuple[int, str], Any] = {}
        self._of_batch_attributes: set[tuple[int, str]] = set()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._wholes: dict[int, Tensor] = {}
        self._entered: list[ScriptContext] = []
        self.samples = SampleAxes()
        """Where the samples are proved to lie, in runs with a graph."""

    def begin(self, inputs: Iterable[Any]) -> None:
        """Take notice of the inputs, as the program will read them."""
        if not self.lean:
            self.samples.begin(tensors_in(list(inputs)))

    def attribute(self, owner: Any, name: str) -> Any:
        """Read a module's attribute.

        Containers, and tensors other than parameters where the program edits tensors, are copies that live as long
        as the run.
        """
        if isinstance(owner, ScriptContext):
            return owner.attributes[name]
        key = (hash(owner), name)
        if key in self._overlay:
            return self._overlay[key]
        value = owner.getattr(name)
        if self.edits:
            value = map_tensors(self.private, value)
        if isinstance(value, list | dict):
            self._overlay[key] = value
        return value

    def private(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, the same one each time; parameters stay themselves.

        Tensors that share memory go on sharing it: an edit of one shows in the other.
        """
        if tensor.layout != torch.strided or tensor.is_quantized:
            return tensor
        if tensor.untyped_storage().data_ptr() in self.parameter_places:
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = (tensor, self._copied(tensor))  # the original is kept: its id stays its own
        return self._copies[id(tensor)][1]

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if speculates():
            return self._copied_by_operators(tensor, place)
        if place not in self._storages:
            self._storages[place] = storage.clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        with torch.no_grad():
            return copy.set_(self._storages[place], tensor.storage_offset(), tensor.shape, tensor.stride())

    def _copied_by_operators(self, tensor: Tensor, place: int) -> Tensor:
        """The same by what can be captured: the memory as one tensor, and views of it."""
        nbytes = tensor.untyped_storage().nbytes()
        if place not in self._wholes:
            if tensor.is_contiguous() and tensor.nbytes == nbytes:
                self._wholes[place] = tensor.clone()
                return self._wholes[place]
            self._wholes[place] = tensor.as_strided((nbytes // tensor.itemsize,), (1,), 0).clone()
        whole = self._wholes[place]
        if whole.dtype != tensor.dtype or whole.nbytes != nbytes:
            raise Unspeculative("memory is copied that holds numbers of several kinds")
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def set_attribute(self, owner: Any, name: str, value: Any, *, tainted: bool) -> None:
        """Write an attribute for this run only: the next job finds the module as it was."""
        if isinstance(owner, ScriptContext):
            owner.attributes[name] = value
            return
        key = (hash(owner), name)
        self._overlay[key] = value
        (self._of_batch_attributes.add if tainted else self._of_batch_attributes.discard)(key)

    def is_of_batch(self, owner: Any, name: str) -> bool:
        """Whether an attribute depends on the batch: this run may have written it."""
        return not isinstance(owner, ScriptContext) and (hash(owner), name) in self._of_batch_attributes

    def put_batch_into(self, slot: int) -> None:
        """Note that a value of the batch went into a container: and so into all that hold it, by whatever name."""
        container, before = self.values[slot], self.tainted[slot]
        self.tainted[slot] = True
        if before or not isinstance(container, list | dict):
            return
        for other, value in enumerate(self.values):
            if _holds(value, container):
                self.tainted[other] = True
        self._of_batch_attributes.update(key for key, value in self._overlay.items() if _holds(value, container))

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy values between slots, all at once (a loop may swap two)."""
        moved = [(self.values[s], self.tainted[s]) for s in sources]
        for target, (value, tainted) in zip(targets, moved, strict=True):
            self.values[target] = value
            self.tainted[target] = tainted

    def release(self, slots: Sequence[int]) -> None:
        """Let go of values that no later step reads: their memory serves the next."""
        values, release = self.values, self.samples.release
        for slot in slots:
            value, values[slot] = values[slot], None
            if type(value) is Tensor:
                release(value, held=2)

    def decide(self, decision: Decision) -> None:
        """Note a branch taken or a loop's number of rounds: they name the path."""
        self.decisions.append(decision)

    def go_round(self) -> None:
        """Note one round of a loop, and stop where there are more than allowed."""
        self.rounds += 1
        if self.most_rounds is not None and self.rounds > self.most_rounds:
            raise EngineError(
                "invalid_inputs", f"loops went round more than {self.most_rounds} times", remedy="give other inputs"
            )

    def enter(self, context: ScriptContext) -> None:
        """Enter a with-block."""
        context.enter()
        self._entered.append(context)

    def exit(self, context: ScriptContext) -> None:
        """Leave a with-block."""
        context.exit()
        self._entered.remove(context)

    def close(self) -> None:
        """Leave every block that an error left open."""
        while self._entered:
            self._entered.pop().exit()

    def read_number(self, value: Any) -> None:
        """Note what the program read from the batch's tensors: it may decide where rows go."""
        if isinstance(value, bool | int):
            self.decisions.append(value)
        else:
            self.readings.append(value)
            self.routed_by_data = True

    def note_cast(self, source: Any, result: Any) -> None:
        """Let it be seen that a method made one value of another: a watched parameter, or a tensor of the batch."""
        if result is source:
            return
        if self.samples.proved:
            self.samples.cast(source, result)
        if self.tape is not None:
            self.tape.observe_cast(source, result)

    def call(self, call: OperatorCall) -> None:
        """Call one operator on the values in its slots, and let the tape see it."""
        values, tainted = self.values, False
        arguments = []
        for slot in call.inputs:
            arguments.append(values[slot])
            tainted = tainted or self.tainted[slot]
        if call.name in _GUARDED:
            self._guard(call, arguments)
        if tainted and call.name in ROUTERS and any(self.tainted[s] for s in call.inputs[1:]):
            self.routed_by_data = True
        for position in call.writes:
            self._guard_parameters(call, arguments[position])
        links = self.tape.links if tainted and self.tape is not None else None
        entry = None if links is None else links.enter(self._of_batch(call, arguments))
        try:
            result: Any = self._opened(call, arguments) if call.name in OPENINGS else None
            opened = result is not None
            if not opened:
                given = _channels_first(arguments) if call.name in _GROUP_NORMS else arguments
                result = call.invoke(given) if self.layout is None else self.layout.invoke(call, given)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise _rejection(call, error) from error
        if not opened:
            self._count(result, arguments)
        if self.summed and tainted:
            found = (Sums.of(t, f"aten::{call.name} ({call.place})") for t in tensors_in(result))
            self.sums.extend(sums for sums in found if sums is not None)
        if self.samples.proved and not opened:
            self.samples.see(call, arguments, result)
        if self.tape is not None and not opened:
            self.tape.observe(call, arguments, result, static=not tainted, samples=self.samples)
        if links is not None and entry is not None:
            links.leave(entry, call, arguments, tensors_in(result))
        if tainted:
            for position in call.writes:
                self._taint(call.inputs[position])
        if len(call.outputs) == 1:
            values[call.outputs[0]] = list(result) if isinstance(result, tuple) else result
            self.tainted[call.outputs[0]] = tainted
            return
        for slot, value in zip(call.outputs, result, strict=True):
            values[slot] = value
            self.tainted[slot] = tainted

    def _opened(self, call: OperatorCall, arguments: list[Any]) -> Any:
        """The result of a fused operator by elementary ones, where it consumes parameters; else None."""
        if self.tape is None or not self.tape.touches(arguments):
            return None
        batch = [tensor for tensors in self._of_batch(call, arguments) for tensor in tensors]
        if call.overload._overloadname == "data" and self.tainted[call.inputs[1]]:
            self.routed_by_data = True  # a packed sequence's lengths say where its rows go
        return OPENINGS[call.name](Elementary(self.tape, call, batch, self._count, self.samples), arguments)

    def _count(self, result: Any, arguments: Sequence[Any]) -> None:
        """Count the memory of a new result, and stop where it is more than allowed."""
        for tensor in (result,) if isinstance(result, Tensor) else result if isinstance(result, tuple | list) else ():
            if isinstance(tensor, Tensor) and _is_new(tensor, arguments):
                self.kept_bytes += tensor.nbytes
        if self.limit_bytes is not None and self.kept_bytes > self.limit_bytes:
            raise TooLarge(self.limit_bytes)

    def _of_batch(self, call: OperatorCall, arguments: list[Any]) -> list[list[Tensor]]:
        """The tensors in each argument, those that depend on the batch."""
        return [tensors_in(a) if self.tainted[s] else [] for a, s in zip(arguments, call.inputs, strict=True)]

    def _guard_parameters(self, call: OperatorCall, edited: Any) -> None:
        """Autograd stops edits of a parameter, but not under no_grad: they would last into the next job."""
        if isinstance(edited, Tensor) and edited.untyped_storage().data_ptr() in self.parameter_places:
            raise _edits_parameters(call)

    def _taint(self, slot: int) -> None:
        """Mark a tensor that now depends on the batch, and every other view of its memory."""
        self.tainted[slot] = True
        edited = self.values[slot]
        if not isinstance(edited, Tensor) or not edited._is_view():
            return
        place = edited.untyped_storage().data_ptr()
        for other, value in enumerate(self.values):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == place:
                self.tainted[other] = True

    def _of_parameters(self, arguments: list[Any]) -> str:
        """Which layer it is, by its parameters: the place is often torch's own code."""
        watched = {} if self.tape is None else self.tape.watched
        names = [w.parameter for a in arguments for w in watched.get(id(a), ())]
        return f", with {' and '.join(names)}" if names else ""

    def _guard(self, call: OperatorCall, arguments: list[Any]) -> None:
        name = call.name.removesuffix("_")
        if name in HOST_READERS and (name not in _RECURRENT or call.overload._overloadname == "data"):
            reads(f"aten::{name}")
        if name in _BATCH_NORMS and _uses_the_batch(call, arguments):
            raise EngineError(
                "training_mode",
                f"batch normalisation runs in training mode{self._of_parameters(arguments)} ({call.place}): each "
                "sample's output depends on the others",
                param="model",
                remedy="call .eval() on the module before tracing or scripting it, and leave eval=True",
            )
        dropping = name in _DROPOUTS and arguments[_DROPOUTS[name]] and arguments[1] > 0
        if name in _RECURRENT:
            flags = [a for a in arguments if isinstance(a, bool)]
            rate = next((a for a in arguments if isinstance(a, float)), 0.0)
            dropping = rate > 0 and len(flags) > 1 and flags[1]
        if dropping and not self.allow_dropout:
            raise EngineError(
                "training_mode",
                f"dropout runs in training mode ({call.place}), although the model is analyzed in eval mode: "
                "a trace made in training mode has it baked in",
                param="model",
                remedy="call .eval() on the module before tracing it, or pass eval=False to keep one random mask",
            )
        self.used_dropout = self.used_dropout or bool(dropping)
        if name in ("embedding", "embedding_bag") and len(arguments) > 3 and arguments[3]:
            raise EngineError(
                "unsupported_operator",
                f"{name} with scale_grad_by_freq ({call.place}): its backward is no derivative, and couples samples",
                param=f"aten::{name}",
                remedy="use an embedding without scale_grad_by_freq",
            )
        if name == "embedding" and len(arguments) > 4:
            arguments[4] = False  # sparse=True changes only the layout of a gradient that is never asked for


def _channels_first(arguments: list[Any]) -> list[Any]:
    """What group normalisation is given on CPUs.

    Its backward ends the process where images lie channels last and their own gradient is not asked for.
    """
    source, *others = arguments
    return [source.contiguous(), *others] if source.is_cpu else arguments


_GUARDED = frozenset(
    [
        *_BATCH_NORMS,
        *_DROPOUTS,
        *_RECURRENT,
        *HOST_READERS,
        "embedding",
        "embedding_bag",
        "dropout_",
        "feature_dropout_",
        "alpha_dropout_",
    ]
)


def _is_new(tensor: Tensor, arguments: Sequence[Any]) -> bool:
    """Whether a result lies in memory of its own; some operators return a view of it, such as linear on sequences."""
    if not tensor._is_view():
        return all(tensor is not a for a in arguments)
    base = tensor._base
    return all(a is not base and a._base is not base for a in shallow_tensors(arguments))


def _uses_the_batch(call: OperatorCall, arguments: list[Any]) -> bool:
    """Whether a batch normalisation takes its statistics over samples."""
    if call.overload._overloadname == "no_stats":  # what instance_norm becomes: one row, its channels all samples'
        return bool(arguments[3]) and arguments[0].shape[0] > 1
    return bool(arguments[_BATCH_NORMS[call.name.removesuffix("_")]])


def _edits_parameters(call: OperatorCall) -> EngineError:
    return EngineError(
        "unsupported_model",
        f"the model edits its own parameters in the forward pass: aten::{call.name} ({call.place})",
        param="model",
        remedy="make the edit outside forward",
    )


def _rejection(call: OperatorCall, error: Exception) -> EngineError:
    """What a failing operator means: nearly always that the inputs do not fit the model."""
    reason = first_line(error)
    if memory_ran_out(error):
        return EngineError(
            "out_of_memory", f"memory ran out in aten::{call.name} ({call.place})", remedy="use a smaller batch"
        )
    if "leaf Variable that requires grad" in reason:
        return _edits_parameters(call)
    return EngineError(
        "invalid_inputs",
        f"the model rejected its inputs at aten::{call.name} ({call.place}): {reason}",
        param="inputs",
        remedy="give inputs of the number, shapes and dtypes that the model was written for",
    )


def _holds(value: Any, container: Any) -> bool:
    """Whether a value is a container, or has it somewhere inside."""
    if value is container:
        return True
    if isinstance(value, dict):
        return any(_holds(v, container) for v in value.values())
    return isinstance(value, list | tuple) and any(_holds(v, container) for v in value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply to every tensor in nested containers."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()}
    return value
