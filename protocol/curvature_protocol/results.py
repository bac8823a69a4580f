"""What a finished job returned: a manifest that describes every stored tensor."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from curvature_protocol.base import Reply

GroupKind = Literal["tensor", "parameters", "factors"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Provenance(Reply):
    """How one tensor came to be."""

    method: str = Field(description='"closed form", "fallback" or "autograd"')
    reduction: str
    Z: float = Field(description="what the loss was divided by")
    scale: str = "loss"
    approximation: str | None = None
    seed: int | None = Field(default=None, description="where draws entered")
    mc_samples: int | None = None
    dtype: str
    device: str
    engine_version: str
    samples_per_chunk: int | None = Field(
        default=None, description="the most samples that shared a forward pass; the batch's where all did"
    )
    halvings: int = Field(
        default=0,
        description="how often memory ran out and pieces (chunks, blocks written out at a time) were halved",
    )
    cached_from: str | None = Field(
        default=None, description="the job that computed it, where it was taken from the cache"
    )
    verified: bool = Field(description="whether the run-time checks (probe, summed contributions) held")
    verification: str | None = Field(
        default=None,
        description='when they were made: "kept verdict" (by an earlier job on this path; its rows confirmed on this '
        'batch), "this job", or "this job, every column" (verify, of what is made of such columns alone)',
    )

    precision: str = Field(default="float32", description="how float32 matrices were multiplied, as asked for")
    channels_last: bool = Field(default=False, description="whether images lay with their channels last")
    precision_error: Finite | None = Field(
        default=None,
        description="what these two changed: the relative difference of the loss's gradient in this parameter (in all "
        "together, for what is no parameter's) from that of float32 products in the usual layout, as measured in the "
        "job; null where both are the default's, or nothing could be compared",
    )


class StoredPart(Reply):
    """A shard's rows of a tensor: bytes of the file `/v1/jobs/{job_id}/result/{label}.safetensors`."""

    job_id: str
    attempt: int
    label: str
    shape: tuple[int, ...]
    byte_start: int
    byte_end: int


class Source(Reply):
    """The job, label and attempt whose file a result taken from the cache is."""

    job_id: str
    attempt: int
    label: str


class TensorEntry(Reply):
    """One tensor inside `{label}.safetensors`. `byte_start`/`byte_end` count from the file's first byte.

    Where there are `parts`, the tensor is what they hold one after another along `axis`, times `multiplier`; the bytes
    are theirs.
    """

    name: str = Field(description="key in the file: {parameter}, {parameter}/{factor}, or the label")
    parameter: str | None = None
    factor: str | None = Field(default=None, description='"B" or "A"')
    dtype: str = Field(description='safetensors name: "F32", "F64", …')
    shape: tuple[int, ...]
    byte_start: int
    byte_end: int
    provenance: Provenance
    parts: tuple[StoredPart, ...] = Field(default=(), description="where a data set's shards keep their rows")
    axis: int = Field(default=0, description="the samples' axis, along which the parts follow each other")
    multiplier: float = Field(
        default=1.0, description="the numbers of the parts times this: their shards did not know the data set's Z"
    )


class ResultGroup(Reply):
    """Everything one requested extension returned, in one safetensors file."""

    label: str
    extension: str
    options: dict[str, Any] = Field(default_factory=dict)
    kind: GroupKind
    convention: str = Field(description="what the numbers mean, to the factor 1/N")
    file_bytes: int = Field(description="of `{label}.safetensors`; 0 where every tensor is kept in parts")
    source: Source | None = Field(default=None, description="where the file lies, if another job made it")
    missing: dict[str, str] = Field(default_factory=dict, description="parameter → why it has no entry")
    tensors: tuple[TensorEntry, ...]


class ShardPart(Reply):
    """What a shard says of its part of the data set, for merging."""

    first_sample: int
    samples: int
    mean_Z: float = Field(description="what the loss would have divided by, under mean")
    path: str = Field(description="digest of the decisions that the model took, and of the numbers that it read")
    probed: bool = Field(description="whether its samples were shown not to be coupled")


class PrecisionError(Reply):
    """What another precision of products or another layout changed, measured in the job: relative, Euclidean norms.

    It is the error of the loss's gradient. A quantity of its squares has about twice as much; one whose terms cancel
    may have more.
    """

    measured: str = Field(description="what was compared with what")
    samples: int = Field(description="for how many of the batch's samples")
    outputs: Finite | None = Field(description="of the model's outputs")
    gradient: Finite | None = Field(description="of the gradient in all parameters asked for together")
    parameters: dict[str, Finite | None] = Field(description="of the gradient in each by itself")


class Manifest(Reply):
    """The description of a result."""

    job_id: str
    attempt: int
    created_at: datetime
    engine_version: str
    format: str = Field(default="torchscript", description='of the model: "torchscript" or "export"')
    loss: float | None = Field(description="L; null when it is not finite (see `warnings`)")
    loss_name: str
    loss_options: dict[str, Any] = Field(default_factory=dict, description="the loss's options, complete")
    loss_output: int | str | None = Field(
        default=None, description="which entry of the tuple or dictionary that the model returned entered the loss"
    )
    reduction: str
    Z: float
    seed: int
    dtype: str
    device: str
    precision: str = Field(default="float32", description="how float32 matrices were multiplied, as asked for")
    channels_last: bool = Field(default=False, description="whether images lay with their channels last, as asked for")
    precision_error: PrecisionError | None = Field(
        default=None, description="what these two changed; null where both are the default's"
    )
    isolation: str = Field(description="which confinement was in force while the model ran")
    samples: int | None = Field(default=None, description="N, of the whole data set")
    parts: int | None = Field(default=None, description="how many shards a data set was computed in")
    part: ShardPart | None = Field(default=None, description="of a shard: its tensors are to be merged, not read")
    aliases: dict[str, str] = Field(default_factory=dict, description="shared parameter's other name → its name")
    groups: tuple[ResultGroup, ...]
    warnings: tuple[str, ...] = ()
    timings_ms: dict[str, float] = Field(default_factory=dict)
