"""With-blocks inside TorchScript: gradient modes and autocast.

Ignoring them changes numbers, so each becomes the real context manager, entered and left where the program says.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from curvature_engine.errors import EngineError
from curvature_engine.tensor_methods import DTYPE_OF


class ScriptContext:
    """An object that the program created for a with-block; its attributes arrive one by one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.attributes: dict[str, Any] = {}
        self._active: AbstractContextManager[Any] | None = None

    def enter(self) -> None:
        """Enter the block."""
        self._active = self._make()
        self._active.__enter__()

    def exit(self) -> None:
        """Leave the block."""
        if self._active is not None:
            self._active.__exit__(None, None, None)
            self._active = None

    def _make(self) -> AbstractContextManager[Any]:
        if self.kind == "no_grad":
            return torch.no_grad()
        if self.kind == "enable_grad":
            return torch.enable_grad()
        if self.kind == "set_grad_enabled":
            return torch.set_grad_enabled(bool(self.attributes.get("mode", True)))
        fast = self.attributes.get("fast_dtype")
        return torch.autocast(
            str(self.attributes.get("device", "cpu")),
            dtype=None if fast is None else DTYPE_OF[fast],
            enabled=bool(self.attributes.get("_enabled", True)),
        )


def make_context(type_name: str, place: str) -> ScriptContext:
    """The context for a TorchScript class, by its qualified name.

    Raises:
        EngineError: `unsupported_operator` for any other class.
    """
    for kind in ("no_grad", "enable_grad", "set_grad_enabled", "autocast"):
        if type_name.endswith(f".{kind}"):
            return ScriptContext(kind)
    raise EngineError(
        "unsupported_operator",
        f"the model makes an object of class {type_name}, which is not supported ({place})",
        param="prim::CreateObject",
        remedy="use tensors, lists, tuples and dictionaries instead of classes",
    )
