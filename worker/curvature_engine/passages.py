"""Matrices through one operator: 1/N Σ_n J_nᵀ B J_n, by the form of its Jacobians J_n."""

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from curvature_engine.chain_steps import Step
from curvature_engine.errors import EngineError, memory_ran_out
from curvature_engine.matrix_products import product_of_columns
from curvature_engine.precision import accumulation_dtype
from curvature_engine.sample_layouts import Layout

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2

_ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in ("Relu", "LeakyRelu", "Hardtanh", "Elu", "Gelu", "Silu", "Mish", "Sigmoid", "Tanh", "Softplus")
)
"""Nodes that are elementwise, which need not be asked."""
_RELU = frozenset({"ReluBackward0"})
_ROWS = 1024
"""Of a matrix that are made at a time."""
_PRODUCT, _PRODUCT_AND_SUM = frozenset({"MmBackward0"}), frozenset({"AddmmBackward0"})


class Passage:
    """Products with the J_nᵀ of one operator, a vector for each sample: [n ≤ N, D_out] → [N, D_in]."""

    def __init__(self, step: Step, before: Layout, after: Layout, generator: torch.Generator) -> None:
        self.step, self.before, self.after = step, before, after
        self._generator = generator

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.before.gathered(self.step.pull_back(self.after.spread(vectors, self.step.target.shape)))

    def anew(self, vectors: Tensor) -> Tensor | None:
        """Products with one J for all samples, [m, D_out] → [m, D_in] for any m, by calling the operator once more.

        None where that is not as simple: for samples beside the first axis, and operators that edit or refuse.
        """
        step, call = self.step, self.step.link.call
        source, target = step.source, step.target
        rows_first = self.before.plain and self.after.plain and source.shape[0] == target.shape[0] == self.before.N
        if call.writes or not rows_first:
            return None
        m = len(vectors)
        with torch.enable_grad():
            x = torch.zeros(m, *source.shape[1:], dtype=source.dtype, device=vectors.device, requires_grad=True)
            arguments = list(step.link.arguments)
            arguments[source.position] = x
            try:
                y = call.invoke(arguments)
            except RuntimeError as error:
                if memory_ran_out(error):
                    raise
                return None
            if not isinstance(y, Tensor) or y.shape != (m, *target.shape[1:]) or not y.requires_grad:
                return None
            (found,) = torch.autograd.grad(y, x, vectors.to(y.dtype).reshape(y.shape))
        return found.reshape(m, -1).to(accumulation_dtype(found.dtype))

    def made_anew(self, vectors: Tensor) -> Tensor:
        """`anew` where it is known to work."""
        found = self.anew(vectors)
        assert found is not None
        return found

    def random(self) -> Tensor:
        """One vector [D_out] that finds out what is claimed of the Jacobian wrongly."""
        random = torch.randn(self.after.D, generator=self._generator, dtype=torch.float64)
        return random.to(self.after.device, accumulation_dtype(self.step.target.dtype))

    def check(self, found: Tensor, expected: Tensor) -> None:
        """Compare what two ways give.

        Raises:
            EngineError: `verification_failed`.
        """
        if not self.agree(found, expected):
            raise EngineError(
                "verification_failed",
                f"{self.step.link.title} does not act as kfra takes it to; no result is given",
                param="kfra",
                remedy="please report this model; kflr gives Kronecker factors without this step",
            )

    def agree(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two ways give the same but for rounding; what is not finite tells nothing."""
        ends = (self.step.source.dtype, self.step.target.dtype)  # a cast is as precise as the coarser one
        tolerance = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in ends)
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not isfinite(difference) or not isfinite(scale):
            return True
        return difference <= tolerance * max(scale, 1e-30)


def average_diagonal(passage: Passage, B: Tensor, N: int) -> Tensor:
    """B ⊙ 1/N Σ_n d_n d_nᵀ, in blocks of rows."""
    d = _passed_by_relu(passage)
    if d is None:
        d = passage(B.new_ones(N, len(B)))
        if not passage.step.is_node(_ELEMENTWISE):
            u = passage.random()
            passage.check(passage(u.expand(N, -1)), d * u)
    d = d.to(B.dtype)
    if len(B) <= _ROWS:
        return (d.T @ (d / N)).mul_(B)
    result, scaled = torch.empty_like(B), d / N
    for first in range(0, len(B), _ROWS):
        rows = slice(first, first + _ROWS)
        product_of_columns(d[:, rows], scaled, result[rows]).mul_(B[rows])
    return result


def _passed_by_relu(passage: Passage) -> Tensor | None:
    """What a ReLU passes on of each sample's elements, [N, D]; None for other operators."""
    node: Any = passage.step.target.edge.node
    if not passage.step.is_node(_RELU):
        return None
    try:
        alive: Tensor = (node._saved_result <= 0).logical_not_()  # NaN passes, as in autograd
    except RuntimeError:  # it has been edited since: autograd says so as ever
        return None
    return passage.before.gathered(alive.reshape(-1))


def conjugate(passage: Passage, B: Tensor, N: int, block_bytes: int) -> Tensor:
    """Jᵀ B J, as many columns a pass as there is room for, or N where the operator takes only its own batch."""
    W = _matrix(passage.step)
    if W is not None and _is_linear(passage.step):
        return _between(W, B)
    u = passage.random()
    same = passage(u.expand(N, -1))
    if W is not None and passage.agree(same, (u.view(-1, len(W)) @ W).view(1, -1)):
        return _between(W, B)
    passage.check(same, same[:1].expand_as(same))
    size, pull_back = N, passage.__call__
    anew = passage.anew(u[None])
    if anew is not None:
        passage.check(anew, same[:1])
        pull_back = passage.made_anew
        size = max(N, block_bytes // ((len(B) + passage.before.D) * B.element_size()))
    half = _pulled_back(pull_back, B, size)  # row j: Jᵀ B[j], so B J
    return _pulled_back(pull_back, half.T.contiguous(), size)  # row i: Jᵀ (B J)[:, i]


def _is_linear(step: Step) -> bool:
    """Whether nothing but a product with the weight lies between the two ends of a linear layer."""
    plain = step.is_node(_PRODUCT) or step.is_node(_PRODUCT_AND_SUM, 1)
    return step.link.name == "linear" and plain


def _between(W: Tensor, B: Tensor) -> Tensor:
    """Jᵀ B J, where every row of an operator is multiplied by W [out, in]: J = diag(W, …, W)."""
    half = (B.view(-1, len(W)) @ W).view(len(B) // len(W), len(W), -1)
    return (W.T @ half).view(-1, half.shape[2])


def _matrix(step: Step) -> Tensor | None:
    """What a product multiplies rows of cotangents by, from the right: [out, in]; None where that is not as simple."""
    link = step.link
    place = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1}.get(link.name)
    if place is None or step.source.position != (0 if link.name == "linear" else place - 1) or not link.intact(place):
        return None
    matrix: Tensor = link.arguments[place].detach()
    if matrix.dim() != 2 or not matrix.dtype == step.source.dtype == step.target.dtype:
        return None
    matrix = matrix.to(accumulation_dtype(matrix.dtype))
    return matrix if link.name == "linear" else matrix.T


def _pulled_back(pull_back: Callable[[Tensor], Tensor], vectors: Tensor, size: int) -> Tensor:
    parts = [vectors[first : first + size] for first in range(0, len(vectors), size)]
    return torch.cat([pull_back(part)[: len(part)] for part in parts])


def average_selected(passage: Passage, B: Tensor, N: int) -> Tensor:
    """1/N Σ_n of B's entries added up at the elements that sample n's outputs were selected from."""
    picked = _picked(passage)
    result = B.new_zeros(passage.before.D, passage.before.D)
    for row in picked:
        result.index_put_((row[:, None], row[None, :]), B, accumulate=True)
    u = passage.random()
    expected = torch.zeros_like(result[0]).expand(N, -1).clone().scatter_add_(1, picked, u.expand(N, -1))
    passage.check(passage(u.expand(N, -1)), expected)
    return result.div_(N)


def _picked(passage: Passage) -> Tensor:
    """For each sample's outputs, which of the sample's inputs max-pooling took: [N, D_out]."""
    step = passage.step
    link, source, rows = step.link, step.source, step.form.row_axes
    pool = getattr(torch.ops.aten, f"{link.name}_with_indices")
    with torch.no_grad():
        _, indices = pool(*link.arguments)
    planes = source.shape[:rows].numel()
    plane = source.shape.numel() // planes
    starts = torch.arange(planes, device=indices.device).view(-1, 1) * plane
    flat = (indices.reshape(planes, -1) + starts).reshape(-1)
    number = torch.empty(source.shape.numel(), dtype=torch.long, device=flat.device)
    number[passage.before.places] = torch.arange(passage.before.D, device=flat.device)
    return number[flat[passage.after.places]]


def average_varying(passage: Passage, B: Tensor, N: int, budget_bytes: int) -> Tensor:
    """1/N Σ_n J_nᵀ B J_n from the J_n themselves, row by row."""
    u = passage.random()
    every_other = torch.zeros(N, 1, dtype=B.dtype, device=B.device)
    every_other[::2] = 1
    passage.check(passage(every_other * u), every_other * passage(u.expand(N, -1)))
    D_out, D_in = len(B), passage.before.D
    together = max(1, min(N, budget_bytes // (D_out * D_in * B.element_size())))
    result = B.new_zeros(D_in, D_in)
    unit = torch.zeros_like(B[:1])
    for first in range(0, N, together):
        J = B.new_empty(min(together, N - first), D_out, D_in)
        for i in range(D_out):
            unit[0, i] = 1
            J[:, i] = passage(unit.expand(N, -1))[first : first + together]
            unit[0, i] = 0
        for Jacobian in J:
            result += Jacobian.T @ (B @ Jacobian)
    return result.div_(N)


# Layouts
