"""Extensions as values: one dataclass each, its fields the options.

A server may know more than this list; names and dictionaries reach those. The server decides what is valid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from curvature_client._errors import refusal
from curvature_protocol.requests import ExtensionRequest, referenced_batch

Scale = Literal["loss", "sample"]
Over = Literal["parameter", "model"]
Fisher = Literal["mc", "type2", "empirical"]
Approximation = Literal["expand", "reduce", "backpack"]

BATCH_OPTIONS = ("against",)
"""Options whose value is a batch: it is uploaded, and the server told its hash."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A quantity to compute. `label` names its result; it defaults to the extension's name."""

    name: ClassVar[str]
    label: str | None = None

    def request(self) -> dict[str, Any]:
        """As the server reads it; an option that is None is left to the server."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "label"}
        given = {n: v if n in BATCH_OPTIONS else _plain(v) for n, v in options.items() if v is not None}
        return {"name": self.name, "label": self.label, "options": given}


@dataclass(frozen=True, kw_only=True)
class BatchLoss(Extension):
    """Each sample's contribution to the loss, [N]."""

    name = "batch_loss"


@dataclass(frozen=True, kw_only=True)
class Outputs(Extension):
    """The model's outputs, [N, …]."""

    name = "outputs"


@dataclass(frozen=True, kw_only=True)
class Grad(Extension):
    """Gradient of the loss, [*p]."""

    name = "grad"


@dataclass(frozen=True, kw_only=True)
class BatchGrad(Extension):
    """Gradient of each sample's contribution, [N, *p] (includes 1/N under mean, unless scale="sample")."""

    name = "batch_grad"
    scale: Scale = "loss"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchL2(Extension):
    """Squared norm of each sample's gradient, [N] per parameter; over="model": one tensor over all parameters."""

    name = "batch_l2"
    over: Over = "parameter"
    scale: Scale = "loss"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchDot(Extension):
    """Inner products of the samples' gradients, [N, N] per parameter; over="model": one tensor over all parameters.

    `against`, another batch in any of the forms that the first one may have, gives those with its gradients, [N, N′].
    """

    name = "batch_dot"
    over: Over = "parameter"
    scale: Scale = "loss"
    subsampling: Sequence[int] | None = None
    against: Any = None


@dataclass(frozen=True, kw_only=True)
class SumGradSquared(Extension):
    """Sum of the squared individual gradients, [*p]."""

    name = "sum_grad_squared"
    scale: Scale = "loss"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Variance(Extension):
    """Biased variance of the individual gradients, [*p]."""

    name = "variance"
    scale: Scale = "loss"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class GradientNoiseScale(Extension):
    """Gradient noise scale, one number per layer (keyed by the layer's name) and, under "*", over all parameters."""

    name = "gradient_noise_scale"


@dataclass(frozen=True, kw_only=True)
class DiagGGNExact(Extension):
    """Diagonal of the generalized Gauss-Newton matrix, [*p]."""

    name = "diag_ggn_exact"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class DiagGGNMC(Extension):
    """The same diagonal through `mc_samples` draws per sample, [*p]."""

    name = "diag_ggn_mc"
    mc_samples: int = 1
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchDiagGGNExact(Extension):
    """Diagonal of each sample's summand of the generalized Gauss-Newton matrix, [N, *p]."""

    name = "batch_diag_ggn_exact"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchDiagGGNMC(Extension):
    """The same diagonals through `mc_samples` draws per sample, [N, *p]."""

    name = "batch_diag_ggn_mc"
    mc_samples: int = 1
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class SqrtGGNExact(Extension):
    """Columns whose squares sum to the diagonal, [V, N, *p] with V = C·T; column c·T + t."""

    name = "sqrt_ggn_exact"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class SqrtGGNMC(Extension):
    """Sampled columns whose squares sum to the sampled diagonal, [V, N, *p] with V = `mc_samples`."""

    name = "sqrt_ggn_mc"
    mc_samples: int = 1
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Saliency(Extension):
    """½ θ² times the diagonal of the generalized Gauss-Newton matrix, exact or (diagonal="mc") sampled, [*p]."""

    name = "saliency"
    diagonal: Literal["exact", "mc"] = "exact"
    mc_samples: int = 1


@dataclass(frozen=True, kw_only=True)
class DiagHessian(Extension):
    """Diagonal of the loss's Hessian, [*p]."""

    name = "diag_hessian"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchDiagHessian(Extension):
    """Diagonal of each sample's summand of the loss's Hessian, [N, *p]."""

    name = "batch_diag_hessian"
    subsampling: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class KFAC(Extension):
    """Kronecker factors (B, A) from `mc_samples` draws per sample.

    `fisher="type2"` takes the exact columns of the loss Hessian (as `KFLR`), `"empirical"` the gradient; `joint_bias`
    puts a layer's bias into its weight's block; `strict` refuses where a parameter has no such factors.
    """

    name = "kfac"
    mc_samples: int = 1
    approximation: Approximation = "expand"
    fisher: Fisher = "mc"
    joint_bias: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class KFLR(Extension):
    """Kronecker factors (B, A) from the exact columns of the loss Hessian."""

    name = "kflr"
    approximation: Approximation = "expand"
    joint_bias: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class KFRA(Extension):
    """Kronecker factors (B, A) from the loss Hessian averaged over the samples at every operator; for chains of layers.

    Models that are no chain (residual connections, shared layers, attention) are refused with the operator at fault.
    """

    name = "kfra"
    approximation: Approximation = "expand"
    joint_bias: bool = False
    strict: bool = False


EXTENSIONS: tuple[type[Extension], ...] = (
    BatchLoss,
    Outputs,
    Grad,
    BatchGrad,
    BatchL2,
    BatchDot,
    SumGradSquared,
    Variance,
    GradientNoiseScale,
    DiagGGNExact,
    DiagGGNMC,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    SqrtGGNExact,
    SqrtGGNMC,
    Saliency,
    DiagHessian,
    BatchDiagHessian,
    KFAC,
    KFLR,
    KFRA,
)


def take_batches(requests: Sequence[Any]) -> tuple[list[Any], dict[tuple[int, str], Any]]:
    """Take the batches out of the options: the requests without them, and (place, option) → batch as given."""
    kept: list[Any] = []
    batches: dict[tuple[int, str], Any] = {}
    for place, item in enumerate(requests):
        request = item.request() if isinstance(item, Extension) else item
        options = request.get("options") if isinstance(request, Mapping) else None
        if isinstance(request, Mapping) and isinstance(options, Mapping):
            given = {o: options[o] for o in BATCH_OPTIONS if options.get(o) is not None}
            given = {option: value for option, value in given.items() if referenced_batch(value) is None}
            batches.update({(place, option): value for option, value in given.items()})
            request = {**request, "options": {k: v for k, v in options.items() if k not in given}}
        kept.append(request)
    return kept, batches


ExtensionLike = str | Mapping[str, Any] | Extension


def read_extensions(given: ExtensionLike | Sequence[ExtensionLike]) -> list[dict[str, Any]]:
    """Bring names, dictionaries and values into the form that the server reads.

    Raises:
        UnprocessableError: something else was given, or two results would have one label.
    """
    items = list_of(given)
    if not items:
        raise refusal(
            "invalid_request",
            "at least one extension is expected; got none",
            param="extensions",
            remedy='name one, e.g. ["diag_ggn_mc"]; `curvature extensions` lists them',
        )
    requests = [_read(item) for item in items]
    labels = [request.key for request in requests]
    for label in labels:
        if labels.count(label) > 1:
            raise refusal(
                "invalid_request",
                f"two results are labelled {label!r}",
                param="extensions",
                remedy="give each request of one extension its own label=",
            )
    return [request.model_dump(exclude_none=True) for request in requests]


def list_of(given: ExtensionLike | Sequence[ExtensionLike]) -> list[ExtensionLike]:
    """One extension, or several, as a list."""
    return [given] if isinstance(given, str | Mapping | Extension | type) else list(given)


def _plain(value: Any) -> Any:
    """Indices as a list, whatever holds them: a range, a tensor of torch or NumPy."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _read(item: Any) -> ExtensionRequest:
    # `KFAC` for `KFAC()`: the class stands for its defaults.
    if isinstance(item, type) and issubclass(item, Extension):
        item = item()
    if isinstance(item, Extension):
        item = item.request()
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping):
        raise refusal(
            "invalid_request",
            f"an extension is a name, a dictionary with a name, or a value such as KFAC(); got {item!r}",
            param="extensions",
            remedy='e.g. ["diag_ggn_mc", KFAC(mc_samples=4)]',
        )
    try:
        return ExtensionRequest.model_validate(dict(item))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "extension"
        raise refusal(
            "invalid_request",
            f"extension {item.get('name', item)!r}: {place}: {first['msg']}",
            param="extensions",
            remedy="write a name, or a dictionary with name, label and options",
        ) from None
