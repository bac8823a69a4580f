"""A program's parameters by storage identity: what shares memory is one parameter under several names."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Parameter:
    """One parameter: its tensors (more than one where a file unties what shares storage) and its names."""

    name: str
    tensors: list[Tensor]
    aliases: list[str] = field(default_factory=list)

    @property
    def tensor(self) -> Tensor:
        """The tensor under the parameter's first name."""
        return self.tensors[0]

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient."""
        return any(t.requires_grad for t in self.tensors)


def group_by_storage(named: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Parameters by first name, and further name → first name.

    Tensors that view the same elements of one storage in the same way are one parameter.
    """
    found: dict[str, Parameter] = {}
    aliases: dict[str, str] = {}
    by_place: dict[tuple[Any, ...], Parameter] = {}
    for name, tensor in named:
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = by_place.get(place) if tensor.numel() else None
        if known is None:
            by_place[place] = found[name] = Parameter(name, [tensor])
            continue
        known.aliases.append(name)
        aliases[name] = known.name
        if all(tensor is not t for t in known.tensors):
            known.tensors.append(tensor)
    return found, aliases
