"""One run of a compiled program: the value table, and what is noticed on the way."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature_engine.contexts import ScriptContext
from curvature_engine.errors import EngineError
from curvature_engine.operators import ROUTERS
from curvature_engine.tape import Tape

Decision = bool | int


class OperatorCall(NamedTuple):
    """One tensor operator of the program, resolved."""

    name: str
    overload: Any
    positional: int
    keywords: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: str


_BATCH_NORMS = {"batch_norm": 5, "native_batch_norm": 5}
_DROPOUTS = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "feature_alpha_dropout": 2}
_RECURRENT = {"lstm": (5, 6), "gru": (5, 6), "rnn_tanh": (5, 6), "rnn_relu": (5, 6)}


@dataclass
class Run:
    """The state of one forward pass.

    `tainted` says per slot whether a value depends on the batch (through tensors; shapes and numbers do not count).
    """

    device: torch.device
    tape: Tape | None
    clone_buffers: bool
    buffer_ids: frozenset[int]
    allow_dropout: bool

    def __post_init__(self) -> None:
        self.values: list[Any] = []
        self.tainted: list[bool] = []
        self.decisions: list[Decision] = []
        self.routed_by_data = False
        self.used_dropout = False
        self._overlay: dict[tuple[int, str], Any] = {}
        self._clones: dict[int, Tensor] = {}
        self._entered: list[ScriptContext] = []

    def attribute(self, owner: Any, name: str) -> Any:
        """Read a module's attribute; buffers are clones where the program may edit tensors in place."""
        if isinstance(owner, ScriptContext):
            return owner.attributes[name]
        if self._overlay and (key := (hash(owner), name)) in self._overlay:
            return self._overlay[key]
        value = owner.getattr(name)
        if self.clone_buffers and isinstance(value, Tensor) and id(value) in self.buffer_ids:
            if id(value) not in self._clones:
                self._clones[id(value)] = value.clone()
            return self._clones[id(value)]
        return value

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Write an attribute for this run only: the next job finds the module as it was."""
        if isinstance(owner, ScriptContext):
            owner.attributes[name] = value
        else:
            self._overlay[hash(owner), name] = value

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy values between slots, all at once (a loop may swap two)."""
        moved = [(self.values[s], self.tainted[s]) for s in sources]
        for target, (value, tainted) in zip(targets, moved, strict=True):
            self.values[target] = value
            self.tainted[target] = tainted

    def decide(self, decision: Decision) -> None:
        """Note a branch taken or a loop's number of rounds: they name the path."""
        self.decisions.append(decision)

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

    def note_cast(self, source: Any, result: Any) -> None:
        """A method applied to a watched parameter is no gather of it: account for it as an unknown operator."""
        if self.tape is not None and result is not source:
            self.tape.record_generic((source,), result, static=True)

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
        try:
            if call.keywords:
                options = dict(zip(call.keywords, arguments[call.positional :], strict=True))
                result = call.overload(*arguments[: call.positional], **options)
            else:
                result = call.overload(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise _rejection(call, error) from error
        if self.tape is not None:
            self.tape.observe(call.name, call.overload, arguments, result, static=not tainted, place=call.place)
        if call.name.endswith("_") and tainted:
            self.tainted[call.inputs[0]] = True
        if len(call.outputs) == 1:
            values[call.outputs[0]] = list(result) if isinstance(result, tuple) else result
            self.tainted[call.outputs[0]] = tainted
            return
        for slot, value in zip(call.outputs, result, strict=True):
            values[slot] = value
            self.tainted[slot] = tainted

    def _guard(self, call: OperatorCall, arguments: list[Any]) -> None:
        name = call.name.removesuffix("_")
        if name in _BATCH_NORMS and arguments[_BATCH_NORMS[name]]:
            raise EngineError(
                "training_mode",
                f"batch normalisation runs in training mode ({call.place}): each sample's output depends on the others",
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
        if name == "embedding" and len(arguments) > 3 and arguments[3]:
            raise EngineError(
                "unsupported_operator",
                f"embedding with scale_grad_by_freq ({call.place}): its backward is no derivative, and couples samples",
                param="aten::embedding",
                remedy="use an embedding without scale_grad_by_freq",
            )
        if name == "embedding" and len(arguments) > 4:
            arguments[4] = False  # sparse=True changes only the layout of a gradient that is never asked for


_GUARDED = frozenset(
    [*_BATCH_NORMS, *_DROPOUTS, *_RECURRENT, "embedding", "dropout_", "feature_dropout_", "alpha_dropout_"]
)


def _rejection(call: OperatorCall, error: Exception) -> EngineError:
    """What a failing operator means: nearly always that the inputs do not fit the model."""
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in reason:
        return EngineError(
            "out_of_memory", f"memory ran out in aten::{call.name} ({call.place})", remedy="use a smaller batch"
        )
    if "leaf Variable that requires grad" in reason:
        return EngineError(
            "unsupported_model",
            f"the model edits its own parameters in the forward pass: aten::{call.name} ({call.place})",
            param="model",
            remedy="make the edit outside forward",
        )
    return EngineError(
        "invalid_inputs",
        f"the model rejected its inputs at aten::{call.name} ({call.place}): {reason}",
        param="inputs",
        remedy="give inputs of the number, shapes and dtypes that the model was written for",
    )
