"""What a model is, found without running it: part of `GET /v1/models/{sha256}`."""

from pydantic import Field

from curvature_protocol.artefacts import Artefact
from curvature_protocol.base import Reply
from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus


class InspectedInput(Reply):
    """One input of the model."""

    name: str
    required: bool


class InspectedOperator(Reply):
    """A tensor operator, and how often it stands in the program, all branches counted."""

    name: str
    count: int


class UnsupportedOperator(Reply):
    """An operator that no run could pass, and where it stands."""

    name: str
    place: str


class InspectedUse(Reply):
    """An operator that consumes a parameter, and where it stands."""

    operator: str
    place: str


class InspectedParameter(Reply):
    """A parameter, and what it is expected to get: only a run can say for sure."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    aliases: tuple[str, ...] = Field(description="further names, where it is shared")
    uses: tuple[InspectedUse, ...]
    closed_form: tuple[str, ...] = Field(description="extensions by rules, or ordinary autograd")
    fallback: tuple[str, ...] = Field(description="extensions by one backward pass per sample")
    none: dict[str, str] = Field(description="extension → why it gives nothing for this parameter")
    note: str | None = Field(default=None, description="what else decides")


class Inspection(Reply):
    """A model's form, and what its parameters are expected to get."""

    engine_version: str
    format: str
    training: bool = Field(description="whether it was saved in training mode")
    fixed_samples: int | None = Field(
        default=None, description="the only number of samples that the file says it takes"
    )
    inputs: tuple[InspectedInput, ...]
    parameters: tuple[InspectedParameter, ...]
    buffers: tuple[str, ...]
    operators: tuple[InspectedOperator, ...]
    unsupported: tuple[UnsupportedOperator, ...]
    notes: tuple[str, ...] = Field(default=(), description="what of the model the file may have lost")


class InspectedModel(Artefact):
    """An uploaded model's record, and its inspection."""

    inspection: Inspection | None = Field(default=None, description="null until `inspection_status` is succeeded")
    inspection_status: JobStatus
    inspection_job: str = Field(description="id of the job that inspects, or did")
    error: Problem | None = Field(default=None, description="why the model cannot be inspected")
