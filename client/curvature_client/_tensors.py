"""Stored tensors as torch.Tensor: shape and type at once, numbers at first use.

Imported only where torch is present.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from curvature_client._remote import Remote, read_index, stored_bytes, type_name

SHOWN_BYTES = 64 * 2**20
"""A larger tensor is described, not downloaded, when something prints it."""

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad", "is_leaf", "grad")
_METHODS = (
    "size",
    "dim",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "__len__",
)
_DESCRIPTIONS = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in (*_PROPERTIES, "is_cuda", "is_sparse", "is_quantized")]
    + [getattr(torch.Tensor, name) for name in (*_METHODS, "is_complex")]
)
"""What can be answered without the numbers."""


class LazyTensor(torch.Tensor):
    """A tensor on the server that reads itself when its numbers are used; every operation gives ordinary tensors.

    `tensor[10:20]` reads those rows alone. `shape`, `dtype`, `nbytes` and their like read nothing.
    """

    _remote: Remote
    _fetched: torch.Tensor | None

    @staticmethod
    def __new__(cls: type["LazyTensor"], remote: Remote) -> "LazyTensor":
        dtype = getattr(torch, type_name(remote.entry))
        return torch.Tensor._make_wrapper_subclass(cls, remote.entry.shape, dtype=dtype, device=torch.device("cpu"))

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._fetched = None

    def fetch(self) -> torch.Tensor:
        """The ordinary tensor, read once and kept."""
        if self._fetched is None:
            self._fetched = torch.from_numpy(self._remote.read())
        return self._fetched

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._fetched is None and (found := read_index(self._remote, index)) is not None:
            return torch.from_numpy(found)
        return self.fetch()[index]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        nbytes = stored_bytes(self._remote.entry)
        if self._fetched is None and nbytes > SHOWN_BYTES:
            megabytes = nbytes / 2**20
            return f"<{self._remote.entry.name}: {self.dtype} {list(self.shape)}, {megabytes:.0f} MiB, not fetched>"
        return repr(self.fetch())

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_fetched(args), **_fetched(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_fetched(args), **_fetched(kwargs or {}))


def _fetched(values: Any) -> Any:
    return tree_map(lambda value: value.fetch() if isinstance(value, LazyTensor) else value, values)
