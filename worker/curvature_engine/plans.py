"""A plan: what an analysis will do, what it costs and how much memory it takes, before it does it."""

from dataclasses import asdict, dataclass
from typing import Any

from curvature_engine.tables import table

_HEADER = ("label", "parameter", "shape", "method", "form", "multiply-adds", "peak", "block", "result")


@dataclass(frozen=True)
class ParameterPlan:
    """What one request does with one parameter.

    Attributes:
        method: "closed form", "fallback" (one backward per sample), "absent" (it does not reach the outputs: zeros),
            or "none" (there is no result, for the `reason`).
        form: how the request's reduction is made: "materialised" (individual gradients written out, in blocks),
            "gram" or "reduced" (without writing them out), "factors"; None where nothing is computed.
        multiply_adds: of the reduction, for all columns and samples.
        peak_bytes: of its intermediates, beside the gradients that came to the layers.
        samples_per_block: whose individual gradients are written out at a time.
        result_bytes: of its own tensors; of a result over all parameters together, 0.
    """

    parameter: str
    shape: tuple[int, ...]
    method: str
    form: str | None
    multiply_adds: int
    peak_bytes: int
    samples_per_block: int
    result_bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class RequestPlan:
    """What one request does.

    Attributes:
        columns: what is propagated back: "outputs" (nothing), "gradient", "exact" or "sampled".
        column_count: how many columns.
        merging: how parts of a data set merge.
        streamed: whether its result goes to a file as it is made.
    """

    label: str
    extension: str
    columns: str
    column_count: int
    merging: str
    streamed: bool
    multiply_adds: int
    result_bytes: int
    parameters: tuple[ParameterPlan, ...]


@dataclass(frozen=True)
class Plan:
    """What an analysis does.

    Attributes:
        budget_bytes: what it may take.
        block_bytes: for individual gradients written out at a time.
        samples_per_chunk: how many samples share a forward pass; N where all do.
        whole_reason: why the batch is not divided although its forward pass exceeds its share of the budget.
        columns: how many there are of each kind: gradient, exact, sampled.
        forward_bytes: what one forward pass keeps for the backward passes.
        peak_bytes: an estimate of the most that is held at a time, beside the process, the model and the batch.
        backward_passes: through the whole graph of a chunk, summed over chunks weighted with their samples; a
            parameter by fallback costs one per sample and column.
        multiply_adds: of all reductions, and of the backward passes through operators that consume parameters.
        gradients: multiply_adds in units of one gradient of the loss.
        precision: of products; `precision` and `channels_last` are as asked for.
    """

    N: int
    dtype: str
    device: str
    engine_version: str
    budget_bytes: int
    block_bytes: int
    samples_per_chunk: int
    chunks: int
    columns: dict[str, int]
    forward_bytes: int
    peak_bytes: int
    result_bytes: int
    backward_passes: int
    multiply_adds: int
    gradients: float
    requests: tuple[RequestPlan, ...]
    whole_reason: str | None = None
    precision: str = "float32"
    channels_last: bool = False

    @property
    def streamed(self) -> tuple[str, ...]:
        """Labels of the results that go to files."""
        return tuple(r.label for r in self.requests if r.streamed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found: dict[str, Any] = _plain(asdict(self))
        return {**found, "streamed": list(self.streamed)}

    def __str__(self) -> str:
        chunk = f"{self.chunks} chunks of at most {self.samples_per_chunk}" if self.chunks > 1 else "one chunk"
        lines = [
            f"{self.N} samples in {chunk}, {self.dtype} on {self.device}; {_columns(self.columns)}",
            f"peak {size(self.peak_bytes)} of {size(self.budget_bytes)} (forward {size(self.forward_bytes)}, "
            f"results {size(self.result_bytes)}); cost {self.gradients:.3g} gradients",
        ]
        if self.peak_bytes > self.budget_bytes:
            lines.append("the peak exceeds the budget: the job may run out of memory")
        if self.whole_reason is not None:
            lines.append(f"not divided: {self.whole_reason}")
        rows: list[tuple[str, ...]] = [
            ("label", "parameter", "shape", "method", "form", "multiply-adds", "peak", "block", "result")
        ]
        for request in self.requests:
            if not request.parameters:
                rows.append((request.label, "", "", "", "", "", "", "", size(request.result_bytes)))
            rows += [_row(request, p) for p in request.parameters]
        return "\n".join([*lines, "", *table(rows)])


def _row(request: RequestPlan, p: ParameterPlan) -> tuple[str, ...]:
    return (
        request.label,
        p.parameter,
        "×".join(map(str, p.shape)),
        p.method if p.reason is None else f"{p.method}: {p.reason}",
        p.form or "",
        f"{p.multiply_adds:.3g}",
        size(p.peak_bytes),
        str(p.samples_per_block),
        size(p.result_bytes) + (" to a file" if request.streamed else ""),
    )


def _columns(columns: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in columns.items() if count) or "no columns"


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def size(count: float) -> str:
    """Bytes in words, e.g. `12.8 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
