"""From the child's word and the files it wrote to a manifest. The files are checked; the child is not believed."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curvature_protocol.results import Manifest, PrecisionError, Provenance, ResultGroup, ShardPart, TensorEntry
from curvature_worker.errors import JobRefused
from curvature_worker.stored_file import StoredTensor, read_stored_file

INFO = (
    "engine_version",
    "format",
    "loss_name",
    "loss_options",
    "loss_output",
    "reduction",
    "Z",
    "seed",
    "dtype",
    "device",
    "aliases",
    "precision",
    "channels_last",
)
SENSELESS = (KeyError, TypeError, ValueError, AttributeError, OSError)
"""What reading a child's word or files may raise."""
_TIMINGS = ("load", "compute", "write")


def build_manifest(
    reply: dict[str, Any],
    files: Mapping[str, Path],
    *,
    job_id: str,
    attempt: int,
    isolation: str,
    warnings: list[str],
) -> Manifest:
    """The manifest of a finished computation.

    Args:
        reply: the child's `done`.
        files: label → file, for the labels asked for, in their order.
        job_id: whose result it is.
        attempt: which attempt computed it.
        isolation: what confined the child.
        warnings: what the client noticed before.

    Raises:
        JobRefused: `internal_error` if the child's word or files are not what they must be.
    """
    try:
        info = {name: reply["info"][name] for name in INFO}
        part = reply["info"].get("part")
        return Manifest(
            job_id=job_id,
            attempt=attempt,
            created_at=datetime.now(UTC),
            loss=reply["loss"],
            isolation=isolation,
            groups=_groups(reply["groups"], files),
            warnings=(*warnings, *_strings(reply["warnings"])),
            timings_ms={name: finite(reply["timings_ms"][name]) for name in _TIMINGS},
            precision_error=read_error(reply["info"]),
            part=None if part is None else ShardPart(**{**part, "mean_Z": finite(part["mean_Z"])}),
            **{**info, "Z": finite(info["Z"])},
        )
    except SENSELESS as error:
        raise senseless(error) from error


def read_error(info: Mapping[str, Any]) -> PrecisionError | None:
    """What a child measured of its precision, if it did.

    Raises:
        KeyError, TypeError, ValueError: it makes no sense.
    """
    said = info.get("precision_error")
    return None if said is None else PrecisionError(**said)


def senseless(error: BaseException) -> JobRefused:
    """The refusal of a result that is not what it must be."""
    lines = str(error).splitlines() or [type(error).__name__]
    reason = f"no {error}" if isinstance(error, KeyError) else lines[0][:300]
    return JobRefused("internal_error", f"the model's process left a result that makes no sense: {reason}")


def _groups(said: list[dict[str, Any]], files: Mapping[str, Path]) -> tuple[ResultGroup, ...]:
    if [group["label"] for group in said] != list(files):
        raise ValueError("labels differ from those asked for")
    return tuple(read_group(group, files[group["label"]]) for group in said)


def read_group(said: dict[str, Any], path: Path) -> ResultGroup:
    """A group as the child announced it, with what its file holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OSError: it makes no sense.
    """
    file = read_stored_file(path)
    names = {tensor.name for tensor in file.tensors}
    if names != set(said["provenance"]):
        raise ValueError(f"{path.name} holds other tensors than were announced")
    if said["kind"] == "tensor" and names != {said["label"]}:
        raise ValueError(f"{path.name} must hold one tensor, named like the label")
    # In the model's order, which the child's word keeps; the file's own is alphabetical.
    place = {name: i for i, name in enumerate(said["provenance"])}
    return ResultGroup(
        label=said["label"],
        extension=said["extension"],
        options=said["options"],
        kind=said["kind"],
        convention=said["convention"],
        file_bytes=file.size_bytes,
        missing=said["missing"],
        tensors=tuple(
            _entry(tensor, said["kind"], said["provenance"][tensor.name])
            for tensor in sorted(file.tensors, key=lambda tensor: place[tensor.name])
        ),
    )


def _entry(tensor: StoredTensor, kind: str, provenance: dict[str, Any]) -> TensorEntry:
    parameter: str | None = tensor.name
    factor = None
    if kind == "factors":
        parameter, _, factor = tensor.name.rpartition("/")
    return TensorEntry(
        name=tensor.name,
        parameter=None if kind == "tensor" else parameter,
        factor=factor,
        dtype=tensor.dtype,
        shape=tensor.shape,
        byte_start=tensor.start,
        byte_end=tensor.end,
        provenance=Provenance(**{**provenance, "Z": finite(provenance["Z"])}),
    )


def finite(value: Any) -> float:
    """A number that JSON can carry."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is no finite number")
    return float(value)


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("warnings are no texts")
    return values
