"""A loss of the user's own: a function of (outputs, targets) whose Hessian comes from autodiff."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature_engine import draws
from curvature_engine.errors import EngineError, first_line, memory_ran_out
from curvature_engine.losses.base import BoundLoss, LossKind, unsupported_loss
from curvature_engine.losses.script import LossScript
from curvature_engine.probe import Code, scaled

LossFunction = Callable[[Tensor, Tensor], Tensor]


class CustomLoss(BoundLoss):
    """One term per sample, ℓ̃_n = function(f, t)_n; under mean Z = N.

    Columns: of the symmetric root of the autodiff Hessian, V = D: there is but one, whatever eigenvectors rounding
    chose. Sampled: that root times standard normal numbers, so that E s sᵀ = H_n. The shortest root: the eigenvectors
    times the roots of their eigenvalues, but those that no sample has.
    """

    name = "custom"

    def __init__(self, outputs: Tensor, targets: Tensor, reduction: str, function: LossFunction) -> None:
        super().__init__(outputs)
        self._f = self.outputs.clone().requires_grad_(True)
        with torch.enable_grad():
            self._terms = function(self._f, targets)
        if not self._terms.requires_grad:
            raise unsupported_loss("the loss does not depend on the outputs", "check for detach and no_grad in it")
        self._score = self._differentiate(self._terms.sum(), create_graph=True)
        self._check_samples_apart()
        self.columns = self.outputs[0].numel()
        self.Z = float(self.N) if reduction == "mean" else 1.0

    def contributions(self) -> Tensor:
        return self._terms.detach() / self.Z

    def gradient(self) -> Tensor:
        return self._score.detach() / self.Z

    def exact_column(self, v: int) -> Tensor:
        return self._roots[:, :, v].reshape(self.outputs.shape)

    @property
    def rank(self) -> int:
        return max(1, int(self._eigen[0].any(0).sum()))

    def root_column(self, v: int) -> Tensor:
        values, vectors = self._eigen  # in ascending order
        return (vectors[:, :, -1 - v] * values[:, -1 - v, None].sqrt()).reshape(self.outputs.shape)

    def sampled_column(self, seed: int, draw: int) -> Tensor:
        positions = torch.arange(self.columns, device=self.outputs.device)
        z = draws.normal(seed, self._samples(), positions, draw).to(self.outputs.dtype)
        return (self._roots @ z[:, :, None]).reshape(self.outputs.shape)

    def check_second_order(self, asked: Sequence[str]) -> None:
        # Made, and the eigenvalues judged, before any backward pass.
        if not bool(self._eigen[0].any()):
            self.warnings.append(f"the loss's second derivatives are zero here, and so are: {', '.join(asked)}")

    @cached_property
    def _roots(self) -> Tensor:
        """R = Rᵀ with H_n = R R, [N, D, D]."""
        values, vectors = self._eigen
        return (vectors * values.sqrt()[:, None, :]) @ vectors.transpose(1, 2)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """(eigenvalues [N, D] in ascending order, none below 0; eigenvectors [N, D, D]) of H_n; NaN if it is none."""
        hessian = self._hessian()
        finite = torch.isfinite(hessian).flatten(1).all(1)[:, None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, hessian, 0.0))
        rounding = 64 * self.columns * torch.finfo(values.dtype).eps * values.abs().max()
        if bool((values < -rounding).any()):
            raise unsupported_loss(
                f"the loss is not convex in the outputs: its Hessian has the eigenvalue {float(values.min()):.6g}",
                "ask for first-order quantities, or use a loss that is convex in the outputs",
            )
        # What is nothing but rounding would have a root many times as large.
        nothing = 4 * self.columns * torch.finfo(values.dtype).eps * values.abs().amax(1, keepdim=True)
        values = torch.where(values <= nothing, 0.0, values)
        return torch.where(finite[:, 0], values / self.Z, float("nan")), vectors

    def _hessian(self) -> Tensor:
        """∂²ℓ̃_n/∂f_n², [N, D, D]: one backward per output, for all samples at once."""
        score = self._score.reshape(self.N, -1)
        if not score.requires_grad:
            return score.new_zeros(self.N, self.columns, self.columns)
        rows = [self._differentiate(score[:, i].sum()).reshape(self.N, -1) for i in range(self.columns)]
        hessian = torch.stack(rows, 1)
        return 0.5 * (hessian + hessian.transpose(1, 2))

    def _differentiate(self, scalar: Tensor, *, create_graph: bool = False) -> Tensor:
        try:
            (found,) = torch.autograd.grad(
                scalar, self._f, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        except RuntimeError as error:
            if memory_ran_out(error):
                raise
            order = "" if create_graph else "twice "
            raise unsupported_loss(
                f"the loss is not {order}differentiable: {first_line(error)}", "write it with other operators"
            ) from error
        return torch.zeros_like(self._f) if found is None else found

    def _check_samples_apart(self) -> None:
        """Scale each sample's loss by its own power of two: its gradient scales alike, exactly, or mixes samples."""
        base = self._score.detach()
        eps = torch.finfo(base.dtype).eps
        rows = base.abs().reshape(self.N, -1).nan_to_num(0.0, 0.0, 0.0).amax(1)
        allowed = 64 * eps * rows + eps**2 * rows.max()
        for factors in Code.for_gradients(self.N, [base]).factors(base.device):
            found = self._differentiate((self._terms * factors.to(base.dtype)).sum())
            difference = (found - scaled(base, factors)).abs().reshape(self.N, -1).nan_to_num(0.0, 0.0, 0.0).amax(1)
            if bool((difference > factors.to(base.dtype) * allowed).any()):
                raise EngineError(
                    "coupled_samples",
                    "the loss function couples samples: one sample's loss depends on another's outputs",
                    param="loss",
                    remedy="let each sample's loss depend on its own outputs alone: no statistics over the batch",
                )


def custom_loss(source: Any) -> LossKind:
    """The loss that a TorchScript function computes: a scripted function or module, a file's bytes or path."""
    script = LossScript(source)

    def bind(outputs: Tensor, targets: Tensor, reduction: str) -> BoundLoss:
        return CustomLoss(outputs, targets, reduction, script)

    return LossKind(bind, "a TorchScript function of (outputs, targets) that returns each sample's loss [N]")
