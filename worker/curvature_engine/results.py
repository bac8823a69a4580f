"""What `analyze` returns."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvature_engine.extensions import KroneckerFactors
from curvature_engine.plans import Plan
from curvature_engine.stores import TensorFile


@dataclass
class Group(Mapping[str, "Tensor | KroneckerFactors"]):
    """Everything one requested extension returned; a mapping from parameter to result.

    Attributes:
        tensors: key in the stored file → tensor: `{parameter}`, `{parameter}/{factor}`, or the label.
        missing: parameter → why it has no entry.
        provenance: key → how the tensor came to be.
        convention: what the numbers mean, to the factor 1/N.
        file: where the tensors lie, if they were written there as they were made.
    """

    label: str
    extension: str
    options: dict[str, Any]
    kind: str
    convention: str
    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    by_parameter: Mapping[str, "Tensor | KroneckerFactors"] = field(default_factory=dict)
    file: TensorFile | None = None

    def __getitem__(self, parameter: str) -> "Tensor | KroneckerFactors":
        parameter = self.aliases.get(parameter, parameter)
        if parameter in self.by_parameter:
            return self.by_parameter[parameter]
        if parameter in self.missing:
            raise KeyError(f"{self.label} has no entry for {parameter}: {self.missing[parameter]}")
        raise KeyError(f"{self.label} has no parameter {parameter!r}; it has {', '.join(self.by_parameter)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_parameter)

    def __len__(self) -> int:
        return len(self.by_parameter)


@dataclass(repr=False)
class Analysis:
    """The result of one request.

    Attributes:
        loss: L, zero-dimensional.
        groups: label → group.
        warnings: what the caller should know.
        info: loss_name, loss_options (complete), loss_output (the entry of the model's output that enters the loss),
            reduction, Z, seed, dtype, device, engine_version, format, aliases.
        plan: what it was computed by.
    """

    loss: Tensor
    groups: dict[str, Group]
    warnings: list[str]
    info: dict[str, Any]
    plan: Plan

    def __getitem__(self, label: str) -> "Group | Tensor":
        """The group of a label; for quantities that are one tensor, that tensor."""
        if label == "loss":
            return self.loss
        group = self.groups[label]
        return group.tensors[label] if group.kind == "tensor" else group

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"<Analysis: loss {float(self.loss):.6g}; {', '.join(self.groups)}>"
