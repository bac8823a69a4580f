"""A plan as the user holds it: what a job would do, readable as a table."""

from curvature_client._tables import dimensions, size, table
from curvature_protocol.plans import ParameterPlan, RequestPlan
from curvature_protocol.plans import Plan as PlanMessage

_HEAD = ("LABEL", "PARAMETER", "SHAPE", "METHOD", "FORM", "MULTIPLY-ADDS", "PEAK", "BLOCK", "RESULT")


class Plan(PlanMessage):
    """What a job would do, what it costs, and how much memory it takes; `print` shows it as a table."""

    def __str__(self) -> str:
        chunk = f"{self.chunks} chunks of at most {self.samples_per_chunk}" if self.chunks > 1 else "one chunk"
        columns = ", ".join(f"{count} {kind}" for kind, count in self.columns.items() if count) or "none"
        lines = [
            f"{self.N} samples in {chunk}, {self.dtype} on {self.device}; columns: {columns}",
            f"peak {size(self.peak_bytes)} of {size(self.budget_bytes)} (forward {size(self.forward_bytes)}, "
            f"results {size(self.result_bytes)}); cost {self.gradients:.3g} gradients",
        ]
        if self.peak_bytes > self.budget_bytes:
            lines.append("the peak exceeds the budget: the job may run out of memory")
        if self.whole_reason is not None:
            lines.append(f"not divided: {self.whole_reason}")
        rows: list[tuple[str, ...]] = [_HEAD]
        for request in self.requests:
            rows += [_row(request, parameter) for parameter in request.parameters]
            if not request.parameters:
                rows.append((request.label, *[""] * 7, size(request.result_bytes)))
        return "\n".join([*lines, "", *table(rows)])


def _row(request: RequestPlan, parameter: ParameterPlan) -> tuple[str, ...]:
    return (
        request.label,
        parameter.parameter,
        dimensions(parameter.shape),
        parameter.method if parameter.reason is None else f"{parameter.method}: {parameter.reason}",
        parameter.form or "-",
        f"{parameter.multiply_adds:.3g}",
        size(parameter.peak_bytes),
        str(parameter.samples_per_block or "-"),
        size(parameter.result_bytes) + (" to disk" if request.streamed else ""),
    )
