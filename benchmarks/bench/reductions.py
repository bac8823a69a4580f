"""First-order quantities from individual gradients: of all at once [N, *p], or one sample after another."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]


class Loop:
    """Keeps every sample's gradient."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, ...]] = []

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        self.kept.append(gradients)

    def finish(self, N: int) -> Tensors:
        return [torch.stack(parts) for parts in zip(*self.kept, strict=True)]


class NormLoop(Loop):
    """Keeps their squared norms."""

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        self.kept.append(tuple(g.square().sum() for g in gradients))


class SumLoop(Loop):
    """Keeps one running sum."""

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        if not self.kept:
            self.kept = [tuple(g.clone() for g in gradients)]
            return
        for total, g in zip(self.kept[0], gradients, strict=True):
            total.add_(g)

    def finish(self, N: int) -> Tensors:
        return list(self.kept[0])


class SquareLoop(SumLoop):
    """Keeps one running sum of squares."""

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        if not self.kept:
            self.kept = [tuple(g.square() for g in gradients)]
            return
        for total, g in zip(self.kept[0], gradients, strict=True):
            total.addcmul_(g, g)


class VarianceLoop:
    """Keeps both sums."""

    def __init__(self) -> None:
        self.first, self.second = SumLoop(), SquareLoop()

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        self.second.add(gradients)
        self.first.add(gradients)

    def finish(self, N: int) -> Tensors:
        pairs = zip(self.first.finish(N), self.second.finish(N), strict=True)
        return [squares / N - (sums / N).square() for sums, squares in pairs]


@dataclass(frozen=True)
class Reduction:
    """One quantity in both ways."""

    batched: Callable[[Tensor], Tensor]
    loop: Callable[[], Loop | VarianceLoop]


REDUCTIONS = {
    "grad": Reduction(lambda g: g.sum(0), SumLoop),
    "batch_grad": Reduction(lambda g: g, Loop),
    "batch_l2": Reduction(lambda g: g.flatten(1).square().sum(1), NormLoop),
    "sum_grad_squared": Reduction(lambda g: g.square().sum(0), SquareLoop),
    "variance": Reduction(lambda g: g.var(0, unbiased=False), VarianceLoop),
}
