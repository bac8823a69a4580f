"""A loss of one's own: a function of (outputs, targets) that gives each sample's loss [N], as the file that carries it.

Given: a function that torch.jit.script takes, what it returned, the path of its saved file, or one of these in a
dictionary {"function": …, "options": {"output": …}}.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvature_client._errors import refusal
from curvature_client._payloads import Payload

_REMEDY = "give a function of (outputs, targets) that returns each sample's loss [N], in torch.jit's part of Python"


@dataclass(frozen=True)
class LossFunction:
    """A loss function's file, and which entry of the model's output it takes."""

    payload: Payload
    output: int | str | None = None

    def request(self) -> dict[str, Any]:
        """As the server reads it."""
        return {"sha256": self.payload.sha256, "output": self.output}


def read_function(loss: Any) -> LossFunction | None:
    """The loss as a function; None where it is something else (a name, a dictionary with options, a module).

    Raises:
        UnprocessableError: the function cannot be scripted, or the path leads nowhere.
    """
    if isinstance(loss, Mapping) and "function" in loss:
        return _from_mapping(loss)
    if isinstance(loss, os.PathLike) or (isinstance(loss, str) and ("." in loss or os.sep in loss)):
        return LossFunction(_of_path(Path(loss)))
    torch = sys.modules.get("torch")  # whoever holds a scripted function has imported it
    if torch is not None and isinstance(loss, torch.jit.ScriptFunction | torch.jit.ScriptModule):
        return LossFunction(_saved(loss))
    if _is_own_function(loss):
        return LossFunction(_saved(_scripted(loss)))
    return None


def _of_path(path: Path) -> Payload:
    if not path.is_file():
        raise refusal(
            "unsupported_loss",
            f"there is no file {path}; a loss function's file is expected",
            param="loss",
            remedy=f"check the path (the current folder is {Path.cwd()}), or give a loss's name",
        )
    return Payload.of_file(path)


def _from_mapping(loss: Mapping[Any, Any]) -> LossFunction:
    options = loss.get("options") or {}
    unknown = [k for k in loss if k not in ("name", "function", "options")] or [k for k in options if k != "output"]
    if unknown or loss.get("name", "custom") != "custom":
        raise refusal(
            "invalid_option",
            f'a loss function comes as {{"function": …, "options": {{"output": …}}}}; got {loss!r:.200}',
            param="loss",
            remedy="fix other values in the function itself",
        )
    found = read_function(loss["function"])
    if found is None:
        raise refusal(
            "unsupported_loss", f"{loss['function']!r:.100} is no function", param="loss.function", remedy=_REMEDY
        )
    return LossFunction(found.payload, options.get("output"))


def _is_own_function(loss: Any) -> bool:
    """Whether it is a function, and none of torch's, which reduce over the samples and have names here."""
    module = getattr(loss, "__module__", None) or ""
    return isinstance(loss, Callable) and hasattr(loss, "__code__") and module.partition(".")[0] != "torch"  # type: ignore[arg-type]


def _scripted(function: Any) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit warns of itself
            return torch.jit.script(function)
    except Exception as error:  # the compiler's errors have many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")
        raise refusal(
            "unsupported_loss",
            f"the loss function {function.__name__!r} cannot be scripted: {reason}",
            param="loss",
            remedy=_REMEDY,
        ) from error


def _saved(scripted: Any) -> Payload:
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(scripted, buffer)
    return Payload.of_bytes(buffer.getvalue())
