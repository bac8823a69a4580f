"""How an analysis multiplies float32 matrices: in float32, or on request in a coarser format that is faster.

torch's own default is no choice: on CUDA it lets cuDNN's convolutions round to TF32, and whoever shares the process may
have changed it. So every analysis says what it wants, and torch's settings are as before when it is over. They are the
whole process's, not a thread's: analyses in float32 run side by side, one in another precision runs alone.

The run-time checks (probe, summed contributions) multiply in float32 whatever is asked for, so they are as sharp as
ever.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from curvature_engine import precision as state
from curvature_engine.errors import EngineError
from curvature_engine.rounded_products import RoundedProducts

PRECISIONS = ("float32", "tf32", "bf16")
_AMPERE = (8, 0)
Settings = list[tuple[Any, str]]
"""Parts of torch, and what they were set to."""
_EXACT = frozenset({"ieee", "none"})
"""torch's names for products in float32; "none" is what nobody has changed."""


def check_precision(precision: Any, device: torch.device, dtypes: set[torch.dtype]) -> None:
    """Refuse another precision than "float32" that there is not, on the device or at all, or that changes nothing.

    Args:
        precision: as asked for.
        device: where products are made.
        dtypes: of the program's parameters.

    Raises:
        EngineError: `invalid_option`.
    """
    if precision not in PRECISIONS:
        raise _refused(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if dtypes and dtypes <= {torch.float64, torch.complex128}:
        raise _refused(f"{precision} is a way to multiply float32 numbers; the model's parameters are float64")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < _AMPERE:
            raise _refused(f"{torch.cuda.get_device_name(device)} has no {precision} products (Ampere and later have)")
    elif precision == "tf32" or device.type != "cpu":
        raise _refused(f"{precision} products do not exist on the device {device.type}")
    elif not _cpu_rounds():
        raise _refused("this CPU has no bf16 products (those with AVX512-BF16 or AMX have)")


class Multiplying:
    """Has float32 matrices multiplied in a precision, as long as it lasts.

    Raises:
        EngineError: `invalid_option`: another analysis of this thread is in progress, in another precision.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self._precision, self._device = precision, device
        rounds = precision == "bf16" and device.type == "cuda"
        self._rounding: Any = RoundedProducts() if rounds else None  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        _TURNS.take(self._precision, self._device)
        if self._precision != "float32":
            state.begin(self._precision)
            if self._rounding is not None:
                self._rounding.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._precision != "float32":
            if self._rounding is not None:
                self._rounding.__exit__(*error)
            state.end()
        _TURNS.give()


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Multiply in float32, within an analysis that may do otherwise."""
    return nullcontext() if state.current() == "float32" else _exactly(device)


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    state.begin("float32")
    before = _set("float32", device)
    try:
        yield
    finally:
        _reset(before)
        state.end()


class _Turns:
    """Who may multiply: any number in float32, or one in another precision.

    The first sets torch, the last resets it.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._precision = "float32"
        self._holders: list[int] = []
        self._before: Settings = []

    def take(self, precision: str, device: torch.device) -> None:
        """Wait for a turn, and have it."""
        me = threading.get_ident()
        with self._free:
            if me in self._holders and self._precision != precision:
                raise _refused(
                    f"an analysis in {self._precision} is in progress; one in {precision} cannot begin in it"
                )
            if me not in self._holders:
                self._free.wait_for(lambda: not self._holders or self._precision == precision == "float32")
            if not self._holders:
                self._before = _set(precision, device)
                self._precision = precision
            self._holders.append(me)

    def give(self) -> None:
        """Let others have it."""
        with self._free:
            self._holders.remove(threading.get_ident())
            if not self._holders:
                _reset(self._before)
                self._free.notify_all()


_TURNS = _Turns()


def _set(precision: str, device: torch.device) -> Settings:
    """Have torch multiply so; what was otherwise."""
    before = []
    for kind, backend in _backends():
        # On CUDA, torch has no setting for bf16: there products are made of rounded factors.
        own = kind == device.type and (precision == "tf32" if kind == "cuda" else precision == "bf16")
        wanted, found = precision if own else "ieee", backend.fp32_precision
        if found != wanted and not (wanted == "ieee" and found in _EXACT):
            before.append((backend, found))
            backend.fp32_precision = wanted
    return before


def _reset(before: Settings) -> None:
    for backend, found in before:
        backend.fp32_precision = found


@cache
def _backends() -> tuple[tuple[str, Any], ...]:
    backends: Any = torch.backends  # whose parts have attributes that no type checker sees
    cpu, cuda, cudnn = backends.mkldnn, backends.cuda, backends.cudnn
    found = [("cpu", cpu.matmul), ("cpu", cpu.conv), ("cpu", cpu.rnn)]
    if cuda.is_built():
        found += [("cuda", cuda.matmul), ("cuda", cudnn.conv), ("cuda", cudnn.rnn)]
    return tuple(found)


@cache
def _cpu_rounds() -> bool:
    """Whether the setting has an effect: it is ignored where the CPU lacks the instructions."""
    a = torch.linspace(1, 2, 128 * 128).view(128, 128)
    cpu, products = torch.device("cpu"), []
    for precision in ("float32", "bf16"):
        before = _set(precision, cpu)
        products.append(a @ a)
        _reset(before)
    return not torch.equal(*products)


def _refused(message: str) -> EngineError:
    return EngineError("invalid_option", message, param="precision", remedy='leave precision out for "float32"')
