"""An extension of one's own: the p-norms of the samples' gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_engine import Accumulator, Contribution, Extension, KroneckerFactors, Setting


class BatchLp(Accumulator):
    """‖g_n‖_p of each sample and parameter, [N] per parameter."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._norms: dict[str, Tensor] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        """Take the individual gradients of one parameter, a block of samples at a time."""
        for first, block in contribution.blocks():
            norms = torch.linalg.vector_norm(block.reshape(len(block), -1), self.setting.options["p"], dim=1)
            if parameter not in self._norms:
                self._norms[parameter] = norms.new_zeros(self.setting.N)
            self._norms[parameter][self._places(first, len(block))] = norms

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a parameter [*p], for the plan."""
        return (self.setting.N,)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        """The norms by parameter."""
        return dict(self._norms)

    def _places(self, first: int, count: int) -> Sequence[int]:
        """Where the block's samples stand in the batch: it may come in parts."""
        return list(self.rows[first : first + count])


BATCH_LP = Extension(
    name="batch_lp",
    summary="p-norm of each sample's gradient",
    kind="parameters",
    shape="[N]",
    formula="‖g_n‖_p = (Σ |g_n|^p)^(1/p), g_n the gradient of sample n's contribution to L",
    source="definition",
    columns="gradient",
    accumulator=BatchLp,
    options={"p": {"type": "number", "minimum": 1, "default": 1, "description": "which norm"}},
    merging="append",
    degree=1,
)
