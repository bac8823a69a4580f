"""What another precision of products, or another layout, changes in the numbers: measured in the job itself.

For the samples of the batch's first chunk (all, where there is one), the gradient of the loss is computed twice: as
the job computes, and in float32 with tensors in their usual layout. Told is the Euclidean norm of the difference beside
that of the latter. It is the error of the *gradient*; a quantity of its squares has about twice as much, and one whose
terms cancel more than its terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.products import exactly
from curvature_engine.tape import backward

if TYPE_CHECKING:
    from curvature_engine.preparation import Prepared

_MEASURED = "relative difference of the loss's gradient from that of float32 products in the usual layout"


@dataclass(frozen=True)
class RoundingError:
    """Relative errors, in Euclidean norms; None where there is nothing to compare (zero, or not finite).

    Attributes:
        samples: for how many it was measured.
        outputs: of the model's outputs.
        gradient: of the loss's gradient in all parameters asked for together.
        parameters: of each by itself.
    """

    samples: int
    outputs: float | None
    gradient: float | None
    parameters: Mapping[str, float | None]

    def of(self, parameter: str) -> float | None:
        """A parameter's, or that of all together for what is no parameter's."""
        return self.parameters.get(parameter, self.gradient)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "measured": _MEASURED,
            "samples": self.samples,
            "outputs": self.outputs,
            "gradient": self.gradient,
            "parameters": dict(self.parameters),
        }


def rounding_error(prepared: "Prepared", targets: Tensor) -> RoundingError:
    """Measure: two forward passes and two backward passes of the first chunk."""
    program = prepared.preparer.order.program
    inputs = prepared.division.inputs(prepared.inputs, 0)
    targets = targets.to(program.device)[: prepared.division.largest]
    outputs, gradients = _gradients(prepared, inputs, targets)
    with exactly(program.device), program.usual_layout():
        exact_outputs, exact_gradients = _gradients(prepared, inputs, targets)
    pairs = {name: _norms([g], [e]) for (name, g), e in zip(gradients.items(), exact_gradients.values(), strict=True)}
    return RoundingError(
        len(targets),
        _relative(*_norms([outputs], [exact_outputs])),
        _relative(*_norms(list(gradients.values()), list(exact_gradients.values()))),
        {name: _relative(*pair) for name, pair in pairs.items()},
    )


def _gradients(prepared: "Prepared", inputs: Any, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs, and the gradient in each parameter."""
    preparer = prepared.preparer
    outputs = preparer.outputs(inputs, graph=preparer.needs_backward)
    if not preparer.needs_backward or not outputs.requires_grad:
        return outputs.detach(), {}
    try:
        gradient = preparer.spec.bind(outputs, targets).gradient()
    except EngineError:  # no target of the chunk counts
        return outputs.detach(), {}
    leaves = {name: parameter.tensors for name, parameter in preparer.selected.items()}
    found = iter(backward(outputs, [t for tensors in leaves.values() for t in tensors], gradient))
    gradients = {}
    for name, tensors in leaves.items():
        parts = [g for _, g in zip(tensors, found, strict=False) if g is not None]
        gradients[name] = torch.stack(parts).sum(0) if parts else torch.zeros_like(tensors[0])
    return outputs.detach(), gradients


def _norms(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """(norm of the difference, norm of the exact), over all tensors."""
    zero = torch.zeros((), dtype=torch.float64)
    difference = sum(((f.double() - e.double()).square().sum() for f, e in zip(found, exact, strict=True)), zero)
    size = sum((e.double().square().sum() for e in exact), zero)
    return float(difference.sqrt()), float(size.sqrt())


def _relative(difference: float, size: float) -> float | None:
    return difference / size if size > 0 and isfinite(difference) and isfinite(size) else None
