"""Steps of a compiled program: what every front end makes of its nodes."""

from collections.abc import Callable, Sequence

import torch

from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Run
from curvature_engine.layouts import LayoutShows

Step = Callable[[Run], None]
_PLAIN = (EngineError, MemoryError, torch.OutOfMemoryError, LayoutShows)
"""What is passed on as it is."""


def explained(step: Step, place: str) -> Step:
    """`step`, with whatever it raises told as an error of the model on these inputs."""

    def guarded(run: Run) -> None:
        try:
            step(run)
        except _PLAIN:
            raise
        except Exception as error:
            raise _failed(place, error) from error

    return guarded


def execute(run: Run, steps: Sequence[tuple[Step, str, Sequence[int]]]) -> None:
    """Take steps, each with its place in the model's code and the slots that no later step reads.

    Raises:
        EngineError: whatever a step raises, as an error of the model on these inputs.
    """
    place = ""
    try:
        for step, at, spent in steps:
            place = at
            step(run)
            if spent:
                run.release(spent)
    except _PLAIN:
        raise
    except Exception as error:
        raise _failed(place, error) from error


def _failed(place: str, error: Exception) -> EngineError:
    return EngineError(
        "invalid_inputs",
        f"the model failed at {place}: {first_line(error)}",
        param="inputs",
        remedy="give inputs of the shapes and types that the model was written for",
    )


def refusing(kind: str, place: str, reason: str = "", remedy: str = "") -> Step:
    """A step that refuses an operator, once the program reaches it."""
    message = f"operator {kind} is not supported" + (f": {reason}" if reason else "") + f" ({place})"
    remedy = remedy or "express it with other operators, or compute it outside the model"

    def step(run: Run) -> None:
        raise EngineError("unsupported_operator", message, param=kind, remedy=remedy)

    return step


def unpacking(source: int, outs: Sequence[int], place: str) -> Step:
    """A step that puts the values of a list or tuple into slots of their own."""

    def step(run: Run) -> None:
        values = run.values[source]
        if len(values) != len(outs):
            raise EngineError(
                "invalid_inputs",
                f"the model expected {len(outs)} values to unpack, got {len(values)} ({place})",
                param="inputs",
                remedy="give inputs of the shapes that the model was written for",
            )
        for out, value in zip(outs, values, strict=True):
            run.values[out] = value
            run.tainted[out] = run.tainted[source]

    return step
