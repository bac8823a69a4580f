"""What a model is, as the server's worker found it without running it; readable as a table."""

import re
import time
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from curvature_client._batches import Batch
from curvature_client._conversion import convert
from curvature_client._datasets import DataSet, read_batch
from curvature_client._errors import NotFoundError, WaitTimeout, job_cancelled, job_failed, refusal
from curvature_client._payloads import Payload
from curvature_client._tables import dimensions, table
from curvature_client._transport import Transport
from curvature_client._uploads import upload
from curvature_protocol.artefacts import SHA256_PATTERN
from curvature_protocol.inspections import InspectedModel, InspectedParameter
from curvature_protocol.inspections import Inspection as InspectionMessage
from curvature_protocol.jobs import FINAL, JobStatus

_POLL_SECONDS = 20.0
_HEAD = ("PARAMETER", "SHAPE", "DTYPE", "CONSUMED BY", "CLOSED FORM", "FALLBACK", "NONE")


class Inspection(InspectionMessage):
    """A model's form, and what its parameters are expected to get; `print` shows it as a table."""

    def __str__(self) -> str:
        inputs = ", ".join(each.name if each.required else f"[{each.name}]" for each in self.inputs)
        elements = sum(prod(parameter.shape) for parameter in self.parameters)
        lines = [
            f"{self.format}{', saved in training mode' if self.training else ''}; inputs: {inputs}",
            f"{len(self.parameters)} parameters, {elements:,} elements; {len(self.buffers)} buffers",
            f"operators: {', '.join(f'{each.name} ×{each.count}' for each in self.operators)}",
        ]
        if self.fixed_samples is not None:
            lines.append(f"takes batches of {self.fixed_samples} samples only")
        lines += [f"not supported: {each.name} ({each.place})" for each in self.unsupported]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", *table([_HEAD, *map(_row, self.parameters)])])


def inspect_model(
    transport: Transport,
    model: Any,
    batch: Any,
    *,
    eval: bool,
    format: str,
    timeout: float | None,
    progress: bool | None,
) -> Inspection:
    """Look at a model, uploading it if the server lacks it; arguments as of `Client.inspect`."""
    deadline = None if timeout is None else time.monotonic() + timeout
    with TemporaryDirectory(prefix="curvature-") as folder:
        given = isinstance(model, str) and re.fullmatch(SHA256_PATTERN, model) is not None and not Path(model).exists()
        payload = None if given else convert(model, _batch(batch), Path(folder), eval=eval, format=format)[0]
        sha256 = model if payload is None else payload.sha256
        found = _look(transport, sha256, payload, deadline, progress)
    if found.error is not None:
        raise job_failed(found.inspection_job, found.error)
    if found.inspection is None:
        raise job_cancelled(found.inspection_job)
    return Inspection.model_validate(found.inspection.model_dump())


def _look(
    transport: Transport, sha256: str, payload: Payload | None, deadline: float | None, progress: bool | None
) -> InspectedModel:
    """The model's record once its inspection is over."""
    while True:
        left = _POLL_SECONDS if deadline is None else max(0.0, min(_POLL_SECONDS, deadline - time.monotonic()))
        try:
            found = transport.get(
                f"/v1/models/{sha256}", InspectedModel, params={"wait": left}, timeout=transport.timeout_beyond(left)
            )
        except NotFoundError as error:
            if payload is None or error.code != "model_not_found":
                raise
            upload(transport, "models", payload, progress)
            payload = None
            continue
        if found.inspection_status in FINAL:
            return found
        if deadline is not None and time.monotonic() >= deadline:
            raise _still_going(found.inspection_job, found.inspection_status)


def _still_going(job_id: str, status: JobStatus) -> WaitTimeout:
    error = WaitTimeout(
        f"the inspection is still {status}; it goes on",
        code="wait_timeout",
        param="timeout",
        remedy="wait longer, or ask again later",
    )
    error.job_id = job_id
    return error


class _NoBatch(Batch):
    """In the place of a batch that was not given."""

    def __init__(self) -> None:
        """Hold nothing."""

    def example_inputs(self) -> Any:
        """Refuse: there are none."""
        raise refusal(
            "invalid_request",
            "the module cannot be scripted, and there are no inputs to trace or export it with",
            param="batch",
            remedy="pass batch=, or a ScriptModule or file",
        )


def _batch(given: Any) -> Batch:
    if given is None:
        return _NoBatch()
    batch = read_batch(given)
    return batch.first() if isinstance(batch, DataSet) else batch


def _row(parameter: InspectedParameter) -> tuple[str, ...]:
    name = parameter.name if parameter.trainable else f"{parameter.name} (frozen)"
    return (
        " = ".join([name, *parameter.aliases]),
        dimensions(parameter.shape),
        parameter.dtype,
        ", ".join(dict.fromkeys(use.operator for use in parameter.uses)) or "-",
        _listed(parameter.closed_form),
        _listed(parameter.fallback),
        _listed(tuple(parameter.none), most=4),
    )


def _listed(names: tuple[str, ...], most: int = 2) -> str:
    return ", ".join(names) or "-" if len(names) <= most else f"{len(names)} extensions"
