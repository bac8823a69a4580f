"""Negative log-likelihood of a Poisson distribution."""

import math

import torch
from torch import Tensor

from curvature_engine.losses.base import LossKind, invalid_targets
from curvature_engine.losses.elementwise import Elementwise
from curvature_engine.speculation import answer


class PoissonNLL(Elementwise):
    """ℓ̃ = exp(f) − t f, or f − t log(f + eps) without `log_input`; with `full` plus Stirling's term for t > 1.

    Columns: √exp(f), or √t/(f + eps). Sampled: those times standard normal numbers, no draws of counts.
    """

    name = "poisson_nll"

    def __init__(
        self,
        outputs: Tensor,
        targets: Tensor,
        reduction: str,
        *,
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(outputs, targets, reduction)
        if answer((self.targets < 0).any()):
            raise invalid_targets(
                f"{self.name} expects counts; got {float(self.targets.min()):.6g}", "give targets from 0"
            )
        self._log_input, self._full, self._eps = log_input, full, eps

    def value(self) -> Tensor:
        f, t = self.outputs, self.targets
        value = f.exp() - t * f if self._log_input else f - t * (f + self._eps).log()
        if self._full:
            safe = t.clamp(min=1.0)
            stirling = safe * safe.log() - safe + 0.5 * (2.0 * math.pi * safe).log()
            value = value + torch.where(t > 1, stirling, 0.0)
        return value

    def first(self) -> Tensor:
        if self._log_input:
            return self.outputs.exp() - self.targets
        return 1.0 - self.targets / (self.outputs + self._eps)

    def second(self) -> Tensor:
        if self._log_input:
            return self.outputs.exp()
        return self.targets / (self.outputs + self._eps).square()


POISSON_NLL = LossKind(
    PoissonNLL,
    "negative log-likelihood of counts under a Poisson distribution; outputs are log-rates or rates, [N, …]",
    {
        "log_input": {"type": "boolean", "default": True, "description": "whether outputs are logarithms of rates"},
        "full": {"type": "boolean", "default": False, "description": "include Stirling's approximation of log t!"},
        "eps": {
            "type": "number",
            "exclusiveMinimum": 0,
            "default": 1e-8,
            "description": "added to rates before the logarithm",
        },
    },
)
