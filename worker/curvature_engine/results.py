"""What `analyze` returns."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvature_engine.extensions import KroneckerFactors
from curvature_engine.plans import Plan
from curvature_engine.rounding_error import RoundingError
from curvature_engine.stores import TensorFile


@dataclass(frozen=True)
class Appended:
    """Results that are the rows of a data set's parts, one part after another.

    Attributes:
        axis: along which they follow each other.
        factor: what the parts' numbers are multiplied by.
        layout: key → (shape of the whole, number format as safetensors names it).
    """

    axis: int
    factor: float
    layout: Mapping[str, tuple[tuple[int, ...], str]]


@dataclass
class Group(Mapping[str, "Tensor | KroneckerFactors"]):
    """Everything one requested extension returned; a mapping from parameter to result.

    Attributes:
        tensors: key in the stored file → tensor: `{parameter}`, `{parameter}/{factor}`, or the label.
        missing: parameter → why it has no entry.
        provenance: key → how the tensor came to be.
        convention: what the numbers mean, to the factor 1/N.
        file: where the tensors lie, if they were written there as they were made.
        appended: of a data set, how the parts' rows make the whole's tensors, of which none is here.

    Of a part of a data set the tensors are its state, which is to be merged with other parts'; a key that parts' states
    hold beside a result's, as `{key}#{name}`, counts as a parameter.
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
    appended: "Appended | None" = None

    def fill(self, results: Mapping[str, "Tensor | KroneckerFactors"]) -> None:
        """Take results by parameter, and their tensors by the keys under which they are stored."""
        self.by_parameter = results
        for parameter, result in results.items():
            if isinstance(result, KroneckerFactors):
                self.tensors[f"{parameter}/B"] = result.B.contiguous()
                if result.A is not None:
                    self.tensors[f"{parameter}/A"] = result.A.contiguous()
            else:
                self.tensors[parameter] = result.contiguous()

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
            reduction, Z, seed, dtype, device, engine_version, format, aliases, precision, channels_last, and in other
            precisions or layouts than by default `precision_error` as JSON. Of a part of a data set Z is 1, and `part`
            holds first_sample, samples, mean_Z (what the part adds to Z under mean), path (a digest of the
            decisions and readings of the program), probed (whether its samples are shown not to be coupled).
        plan: what it was computed by.
        precision_error: what `precision` and `channels_last` changed, measured; None by default.
    """

    loss: Tensor
    groups: dict[str, Group]
    warnings: list[str]
    info: dict[str, Any]
    plan: Plan
    precision_error: RoundingError | None = None

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
