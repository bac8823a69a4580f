"""What `verify=True` adds: summed contributions against ordinary gradients.

For every column that is propagated back, each parameter's contributions are summed over the samples and held against
the ordinary gradient under that column; for first-order quantities that is the gradient of the loss.

Both sums are made in their own order, so they agree up to rounding. How much rounding there is cannot be read off a sum
whose terms cancel, and a fallback's terms are not at hand; so it is measured: gradients are linear in the cotangent,
and three times the gradient under a third of it differs from the gradient itself by rounding alone.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.judgement import HALF_TOLERANCE, TOLERANCE
from curvature_engine.parameters import Parameter
from curvature_engine.precision import accumulation_dtype, is_reduced
from curvature_engine.tape import backward

KEPT_VERDICT, THIS_JOB, EVERY_COLUMN = "kept verdict", "this job", "this job, every column"
"""When run-time checks were made: by an earlier job on this path, whose rows were confirmed on this batch; in this job;
and in this job for each column."""

_LEAST_ROUNDINGS = 64.0
"""A sum may differ by so many times the measured rounding, or by as many as its dtype's tolerance holds."""


class Verification:
    """The ordinary gradients under one cotangent, to hold contributions against.

    Attributes:
        finite: whether every gradient compared so far was finite: only then does the comparison prove anything.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, Parameter], cotangent: Tensor) -> None:
        self._outputs, self._parameters, self._cotangent = outputs, parameters, cotangent
        self._expected = self._gradients(cotangent)
        self.finite = True

    def check(self, name: str, contribution: Contribution) -> None:
        """Compare a parameter's contributions.

        Raises:
            EngineError: `verification_failed`.
        """
        expected = self._expected[name]
        if not bool(torch.isfinite(expected).all()):
            self.finite = False
            return
        total = contribution.total()
        worst = (total - expected).abs().max() if expected.numel() else expected.new_zeros(())
        dtype = self._parameters[name].tensor.dtype
        of_sum, of_terms = HALF_TOLERANCE if is_reduced(dtype) else TOLERANCE.get(dtype, HALF_TOLERANCE)
        if not expected.numel() or bool(worst <= of_sum * expected.abs().max()):
            return
        eps = torch.finfo(dtype).eps
        rounding = (self._expected_by_thirds[name] - expected).abs().max()
        if bool(worst <= max(_LEAST_ROUNDINGS, of_terms / eps) * rounding):
            return
        raise EngineError(
            "verification_failed",
            f"the contributions to parameter {name}, summed over the samples, differ from the ordinary gradient by "
            f"{float(worst):.3g} (its largest entry is {float(expected.abs().max()):.3g}); no result is given",
            param=name,
            remedy="please report this model",
        )

    @cached_property
    def _expected_by_thirds(self) -> dict[str, Tensor]:
        return {name: 3.0 * gradient for name, gradient in self._gradients(self._cotangent / 3.0).items()}

    def _gradients(self, cotangent: Tensor) -> dict[str, Tensor]:
        found = iter(backward(self._outputs, [t for p in self._parameters.values() for t in p.tensors], cotangent))
        totals = {}
        for name, parameter in self._parameters.items():
            like = parameter.tensor
            total = torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device)
            for gradient in (next(found) for _ in parameter.tensors):
                if gradient is not None:
                    total += gradient
            totals[name] = total
        return totals


def least(found: Iterable[str | None]) -> str | None:
    """What holds for all together of when checks were made; None where for one of them they were not."""
    order = (None, KEPT_VERDICT, THIS_JOB, EVERY_COLUMN)
    return min(found, key=order.index)
