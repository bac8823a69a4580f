"""What nobody can do without, in units of one gradient: multiply-adds of the passes, and numbers to be written.

A gradient costs each operator with parameters one forward product, one input-side product (but where its input needs
no gradient) and one weight-side product, of equal size f = T · d_in · d_out for each sample. Everything elementwise is
left out. Products with a matrix's own transpose count in full, although a symmetric routine could halve them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.bench.cases import Case
from benchmarks.bench.works import Work
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One use of a weight by one sample: x [T, d_in] → [T, d_out]."""

    T: int
    d_in: int
    d_out: int
    propagates: bool
    factored: bool = True

    @property
    def f(self) -> int:
        return self.T * self.d_in * self.d_out

    def least_norm(self) -> int:
        """Of ‖xᵀg‖²: written out, or from the Gram matrices of x and g."""
        return min(self.f, self.T**2 * (self.d_in + self.d_out))

    def factors(self, columns: float, approximation: str) -> float:
        """Of A and B."""
        A = (1 if approximation == "reduce" else self.T) * self.d_in**2
        B = (self.T if approximation == "expand" else 1) * self.d_out**2
        return (A + columns * B) if self.factored else 0


def layers_of(case: Case) -> list[Layer]:
    """Read off one sample's forward pass."""
    found: list[Layer] = []
    tied = {id(m.weight) for m in case.module.modules() if isinstance(m, nn.Embedding)}

    def record(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        d_out = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
        T = output[0].numel() // d_out
        d_in = module.weight[0].numel()
        found.append(Layer(T, d_in, d_out, inputs[0].requires_grad, id(module.weight) not in tied))

    counted = [m for m in case.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(record) for m in counted]
    try:
        case.module(case.inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Costs:
    """Multiply-adds for one sample, and how long it takes to write numbers, all in units of one gradient."""

    layers: list[Layer]
    writing: float
    """One [N, *p] for every parameter."""

    @property
    def gradient(self) -> int:
        return sum(layer.f * (2 + layer.propagates) for layer in self.layers)

    @property
    def forward(self) -> float:
        return sum(layer.f for layer in self.layers) / self.gradient

    weights = forward

    @property
    def inputs(self) -> float:
        return sum(layer.f for layer in self.layers if layer.propagates) / self.gradient

    def columns(self, V: float) -> float:
        """A diagonal: V columns back to the weights."""
        return self.forward + V * (self.inputs + self.weights)

    def written(self, V: float) -> float:
        """Individual results of every column: computed or, where that takes longer, written."""
        return self.forward + V * (self.inputs + max(self.weights, self.writing))

    def written_once(self, V: float) -> float:
        """Individual results in all, of V columns."""
        return self.forward + V * self.inputs + max(V * self.weights, self.writing)

    def norms(self) -> float:
        return self.forward + self.inputs + sum(layer.least_norm() for layer in self.layers) / self.gradient

    def variance(self) -> float:
        """Σ g² and Σ g are products of their own where a sample has one row; else sums of what is written out."""
        products = sum(layer.f * (2 if layer.T == 1 else 1) for layer in self.layers)
        return self.forward + self.inputs + products / self.gradient

    def kronecker(self, V: float, approximation: str) -> float:
        factors = sum(layer.factors(V, approximation) for layer in self.layers)
        return self.forward + V * self.inputs + factors / self.gradient


SAMPLED: dict[str, Callable[[Costs], float]] = {
    "outputs": lambda c: c.forward,
    "batch_loss": lambda c: c.forward,
    "grad": lambda c: c.columns(1),
    "batch_grad": lambda c: c.written(1),
    "batch_l2": Costs.norms,
    "sum_grad_squared": lambda c: c.columns(1),
    "variance": Costs.variance,
    "gradient_noise_scale": lambda c: c.norms() + c.weights,
    "diag_ggn_mc": lambda c: c.columns(1),
    "diag_ggn_mc+grad": lambda c: c.columns(2),
    "batch_diag_ggn_mc": lambda c: c.written(1),
    "sqrt_ggn_mc": lambda c: c.written(1),
    "first_order": lambda c: c.written(1),
}
EXACT: dict[str, Callable[[Costs, float], float]] = {
    "diag_ggn_exact": Costs.columns,
    "saliency": Costs.columns,
    "batch_diag_ggn_exact": Costs.written_once,
    # Of a net that is piecewise linear; what bends costs more.
    "diag_hessian": Costs.columns,
    "batch_diag_hessian": Costs.written_once,
}


def floors(case: Case, work: Work, gradient_seconds: float, bandwidth: float) -> dict[str, float]:
    """By number of columns where there are several: C − 1, the rank of a softmax's Hessian, and all C."""
    numbers = case.N * sum(p.numel() for p in case.module.parameters())
    writing = numbers * torch.finfo(case.place.dtype).bits / 8 / bandwidth / gradient_seconds
    costs = Costs(layers_of(case), writing)
    V = case.columns
    if work.name in SAMPLED:
        return {"floor": SAMPLED[work.name](costs)}
    if work.name == "sqrt_ggn_exact":
        return {"floor": costs.written(V)}
    if work.name in EXACT:
        return {
            "floor": EXACT[work.name](costs, V - case.positions),
            "floor with C columns": EXACT[work.name](costs, V),
        }
    return _kronecker(case, work, costs)


def _kronecker(case: Case, work: Work, costs: Costs) -> dict[str, float]:
    name, approximation = work.names[0], work.requests[0].options.get("approximation", "")
    if name == "kfac":
        return {"floor": costs.kronecker(1, approximation)}
    if name == "kflr":
        V = case.columns
        return {
            "floor": costs.kronecker(V - case.positions, approximation),
            "floor with C columns": costs.kronecker(V, approximation),
        }
    return {}
