"""What a client asks for: a model, a batch, extensions and a loss."""

import base64
import re
from typing import Annotated, Any, Literal

from pydantic import Base64Encoder, EncodedBytes, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from curvature_protocol.artefacts import SHA256_PATTERN
from curvature_protocol.base import Message

LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
RESERVED_LABELS = frozenset({"loss", "manifest"})
PRIORITIES = range(10)
MOST_PARTS = 20_000
SECRET_PREFIX = "whsec_"
TAG_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

Label = Annotated[str, Field(pattern=LABEL_PATTERN)]
Pattern = Annotated[str, Field(min_length=1, max_length=512)]
Precision = Literal["float32", "tf32", "bf16"]
Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]


class _StrictBase64(Base64Encoder):
    """Standard base64 and nothing else: the usual decoder skips characters it does not know."""

    @classmethod
    def decode(cls, data: bytes) -> bytes:
        """The bytes that `data` stands for."""
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            reason = {"reason": str(error)}
            raise PydanticCustomError("base64_decode", "the data are no base64: {reason}", reason) from None


def referenced_batch(value: Any) -> str | None:
    """The SHA-256 that an option's value refers to a batch by; None for values of other kinds."""
    if not isinstance(value, dict) or set(value) != {"sha256"}:
        return None
    sha256 = value["sha256"]
    return sha256 if isinstance(sha256, str) and re.fullmatch(SHA256_PATTERN, sha256) else None


class ExtensionRequest(Message):
    """One quantity to compute. `label` names its result; it defaults to the extension's name."""

    name: str = Field(min_length=1, max_length=64)
    label: Label | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def batches(self) -> dict[str, str]:
        """Option → SHA-256 of the uploaded batch that it refers to, e.g. `against`."""
        found = {name: referenced_batch(value) for name, value in self.options.items()}
        return {name: sha256 for name, sha256 in found.items() if sha256 is not None}

    @property
    def key(self) -> str:
        """The label under which results, URLs and stored keys know this request."""
        return self.label if self.label is not None else self.name


class LossRequest(Message):
    """A loss by name with its options, e.g. `{"name": "cross_entropy"}`."""

    name: str = Field(min_length=1, max_length=64)
    options: dict[str, JsonValue] = Field(default_factory=dict)


class LossReference(Message):
    """A loss function uploaded before, by hash: TorchScript of (outputs, targets), returns each sample's loss [N]."""

    sha256: Sha256
    output: int | str | None = Field(
        default=None, description="which entry of the tuple or dictionary that the model returns enters the loss"
    )


class BatchReference(Message):
    """A batch uploaded before, by hash."""

    sha256: Sha256


class InlineBatch(Message):
    """A small batch riding inside the request: the bytes of a safetensors file, base64 on the wire."""

    data: Annotated[bytes, EncodedBytes(encoder=_StrictBase64)]


class DataSetPart(Message):
    """One batch of a data set, uploaded before."""

    sha256: Sha256
    samples: int = Field(ge=1, description="how many samples it holds: rows of its targets")


class DataSet(Message):
    """Several batches as one, in their order: a sample's index counts through all of them."""

    parts: tuple[DataSetPart, ...] = Field(min_length=1, max_length=MOST_PARTS)

    @property
    def samples(self) -> int:
        """N of the whole data set."""
        return sum(part.samples for part in self.parts)


class Requirements(Message):
    """What a worker must have to take the job up."""

    gpu: bool = False
    tag: str | None = Field(default=None, pattern=TAG_PATTERN, description="one of the worker's tags")
    memory_bytes: int = Field(default=0, ge=0, description="beside model and batch")


def signing_key(secret: str) -> bytes:
    """The bytes that a webhook's secret stands for.

    Raises:
        ValueError: after the prefix of Standard Webhooks, `whsec_`, comes no base64.
    """
    encoded = secret.removeprefix(SECRET_PREFIX)
    if encoded == secret:
        return secret.encode()
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        raise ValueError(f"after {SECRET_PREFIX!r} the secret must be base64 of the key's bytes") from None


class Webhook(Message):
    """Where to send a message when the job or sweep is over (docs/webhooks.md)."""

    url: str = Field(max_length=2048, pattern=r"^https?://[^\s]+$")
    secret: str | None = Field(
        default=None,
        min_length=16,
        max_length=512,
        pattern=r"^[!-~]*$",
        repr=False,
        description="signs the message; never shown again. As it is, or `whsec_` and base64 of the key's bytes",
    )

    @model_validator(mode="after")
    def _is_a_key(self) -> "Webhook":
        if self.secret is not None:
            signing_key(self.secret)
        return self


class JobRequest(Message):
    """The body of `POST /v1/jobs`.

    Bare strings are accepted for `extensions` entries and for `loss`.
    """

    model: Sha256
    batch: BatchReference | InlineBatch | DataSet
    extensions: tuple[ExtensionRequest, ...] = Field(min_length=1, max_length=64)
    loss: LossRequest | LossReference | None = None
    reduction: Literal["mean", "sum"] = "mean"
    seed: int = Field(default=0, ge=0, lt=2**63)
    parameters: Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=1024)] = Field(
        default="trainable",
        description='"trainable" (those that require a gradient), "all", or shell-style patterns of names, e.g. "0.*"',
    )
    eval: bool = True
    verify: bool = Field(
        default=False,
        description="judge the model's path anew and hold every parameter's summed contributions against the ordinary "
        "gradient, whatever verdict is kept; a mismatch fails the job (`verification_failed`)",
    )
    precision: Precision = Field(
        default="float32",
        description='how float32 matrices are multiplied; "tf32" (GPUs from Ampere on) and "bf16" (these, and some '
        "CPUs) are faster and less exact: the manifest says by how much (`precision_error`)",
    )
    channels_last: bool = Field(
        default=False, description="lay images and the weights of convolutions out with their channels last in memory"
    )
    priority: int = Field(default=5, ge=0, le=9, description="0 (last) to 9 (first)")
    timeout_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="limit on the computation itself"
    )
    requires: Requirements = Requirements()
    cache: bool = Field(default=True, description="take what was computed before, and keep this result for others")
    webhook: Webhook | None = None
    metadata: dict[str, str] = Field(default_factory=dict, max_length=32)
    warnings: tuple[str, ...] = Field(
        default=(), max_length=32, description="what the client already noticed; repeated with the result"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("loss"), str):
            data["loss"] = {"name": data["loss"]}
        if isinstance(data.get("extensions"), list | tuple):
            data["extensions"] = [{"name": e} if isinstance(e, str) else e for e in data["extensions"]]
        return data

    @model_validator(mode="after")
    def _tf32_is_for_gpus(self) -> "JobRequest":
        if self.precision == "tf32" and not self.requires.gpu:
            raise ValueError('precision "tf32" is a GPU\'s: ask for a worker with one, "requires": {"gpu": true}')
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> "JobRequest":
        keys = [extension.key for extension in self.extensions]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise ValueError(
                f"labels must be distinct; repeated: {', '.join(repeated)}; "
                'give each request of one extension its own "label"'
            )
        if reserved := sorted(RESERVED_LABELS.intersection(e.label for e in self.extensions if e.label)):
            raise ValueError(f"labels {', '.join(reserved)} are reserved; choose another")
        return self
