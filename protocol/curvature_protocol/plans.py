"""What a job would do, before it does it: `POST /v1/plans`."""

from typing import Literal

from pydantic import Field

from curvature_protocol.base import Reply
from curvature_protocol.jobs import Job


class ParameterPlan(Reply):
    """What one request does with one parameter."""

    parameter: str
    shape: tuple[int, ...]
    method: Literal["closed form", "fallback", "absent", "none"] = Field(
        description='by rules; by one backward pass per sample; "absent": it does not reach the outputs, zeros; '
        '"none": no result, for the `reason`'
    )
    form: str | None = Field(default=None, description='"materialised", "gram", "reduced", "factors" or "autograd"')
    multiply_adds: int
    peak_bytes: int = Field(description="of its intermediates")
    samples_per_block: int = Field(description="whose individual gradients are written out at a time")
    result_bytes: int
    reason: str | None = None


class RequestPlan(Reply):
    """What one of the extensions asked for does."""

    label: str
    extension: str
    columns: str = Field(description="what is sent back through the model")
    column_count: int
    merging: str = Field(description="how results of parts of the batch become that of all")
    streamed: bool = Field(description="whether the result goes to disk as it is made")
    multiply_adds: int
    result_bytes: int
    parameters: tuple[ParameterPlan, ...]


class Plan(Reply):
    """Method, cost and memory of a job."""

    N: int
    dtype: str
    device: str
    engine_version: str
    budget_bytes: int = Field(description="what the computation may take")
    block_bytes: int
    samples_per_chunk: int = Field(description="how many samples share a forward pass")
    chunks: int
    whole_reason: str | None = Field(default=None, description="why the batch is not divided")
    columns: dict[str, int] = Field(description="how many of each kind")
    forward_bytes: int
    peak_bytes: int = Field(description="estimate of the most that is held at a time, beside model and batch")
    result_bytes: int
    backward_passes: int
    multiply_adds: int
    gradients: float = Field(description="the cost in units of one gradient of the loss")
    requests: tuple[RequestPlan, ...]
    precision: str = Field(default="float32", description="how float32 matrices are multiplied")
    channels_last: bool = Field(default=False, description="whether images lie with their channels last")


class PlanJob(Job):
    """A plan on its way: a job of kind "plan", and the plan once it has succeeded."""

    plan: Plan | None = None
