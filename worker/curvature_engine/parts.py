"""A data set in parts: what a part is, and which quantities of parts become that of the whole, and how.

A part is analyzed as if the loss were a sum (Z = 1), since nobody knows the whole's Z yet, and with its samples'
numbers in the whole data set, by which draws are made. `merging.py` makes the whole of what parts leave.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curvature_engine.errors import EngineError
from curvature_engine.extensions import EXTENSIONS, Extension
from curvature_engine.extensions.mergers import Merger, Sum
from curvature_engine.plugins import load_plugins
from curvature_engine.requests import Request, parse_requests


@dataclass(frozen=True)
class DataSetPart:
    """Says that a batch is a part of a data set.

    Attributes:
        first_sample: the number, in the whole data set, of the batch's first sample.
    """

    first_sample: int


@dataclass(frozen=True)
class LabelMerging:
    """How one request's results of parts become the whole's.

    Attributes:
        how: "append": the whole is the parts' rows, one part after another; "merge": their states are joined.
        axis: along which rows are appended.
        degree: the whole is what comes of that divided by Z to this power (of Kronecker factors, B is).
        merger: joins states.
    """

    label: str
    extension: str
    how: Literal["append", "merge"]
    axis: int
    degree: float
    merger: Merger | None

    def factor(self, Z: float) -> float:
        """What the whole's numbers are multiplied by, once Z is known."""
        return 1.0 if self.degree == 0.0 else float(Z**-self.degree)


def plan_merging(extensions: Any, *, reduction: str = "mean") -> dict[str, LabelMerging]:
    """How results of a data set's parts become the whole's, by label; of quantities that cannot, the refusal.

    Args:
        extensions: as for `analyze`. Another batch, named by an option, is refused without being looked at.
        reduction: "mean" or "sum".

    Raises:
        EngineError: `whole_batch_required`; and as `analyze` for requests that make no sense.
    """
    load_plugins()
    _refuse_other_batches(extensions)
    return check_mergeable(parse_requests(extensions), reduction)


def check_mergeable(requests: Sequence[Request], reduction: str) -> dict[str, LabelMerging]:
    """How results of these requests merge, by label.

    Raises:
        EngineError: `whole_batch_required`.
    """
    return {request.label: _merging_of(request, reduction) for request in requests}


def whole_batch_required(param: str, reason: str, remedy: str) -> EngineError:
    """Results of parts would not be the whole's."""
    return EngineError("whole_batch_required", f"not over a data set in parts: {reason}", param=param, remedy=remedy)


def path_digest(decisions: Sequence[Any], readings: Sequence[Any]) -> str:
    """What tells the path that a part took through the program from other paths: 64 hexadecimal digits."""
    return hashlib.sha256(repr((tuple(decisions), tuple(readings))).encode()).hexdigest()


def _merging_of(request: Request, reduction: str) -> LabelMerging:
    extension, label = request.extension, request.label
    for option in ("subsampling", "against"):
        if request.options.get(option) is not None:
            raise _option_refused(extension.name, option)
    if reason := obstacle(extension, reduction):
        named = label if label == extension.name else f"{label} ({extension.name})"
        raise whole_batch_required(
            label, f"{named} cannot be merged: {reason}", f"give all samples as one batch, or leave {label} out"
        )
    how: Literal["append", "merge"] = "append" if extension.merging == "append" else "merge"
    merger = None if how == "append" else (extension.merger or Sum)()
    axis = extension.sample_axis if how == "append" else 0
    return LabelMerging(label, extension.name, how, axis, extension.degree or 0.0, merger)


def obstacle(extension: Extension, reduction: str) -> str | None:
    """What of merging an extension does not declare, or None."""
    if extension.merging == "whole batch":
        return "it takes all samples together"
    if extension.merger is None and (extension.merging == "welford" or extension.kind == "factors"):
        return f"it declares no merger for its {extension.merging} of {extension.kind}"
    if extension.degree is None and reduction == "mean":
        return "it does not declare its degree, the power of Z that divides it under mean"
    return None


def _option_refused(extension: str, option: str) -> EngineError:
    reason = (
        f"{extension}'s subsampling names samples of one batch"
        if option == "subsampling"
        else f"{extension}'s {option} is another batch, whose samples meet all of this one's"
    )
    return whole_batch_required(
        f"{extension}.{option}", reason, f"leave {option} out, or ask for it of one batch by itself"
    )


def _refuse_other_batches(extensions: Any) -> None:
    """Refuse what no request could be read from here: options that hold a batch, which may be given by its hash."""
    for item in extensions if isinstance(extensions, list | tuple) else [extensions]:
        options = item.get("options") if isinstance(item, Mapping) else None
        extension = EXTENSIONS.get(str(item.get("name"))) if isinstance(item, Mapping) else None
        if extension is None or not isinstance(options, Mapping):
            continue
        for option, schema in extension.options.items():
            if "object" in schema.get("type", ()) and options.get(option) is not None:
                raise _option_refused(extension.name, option)
