"""What the model's own second derivatives add to the Hessian's diagonal, beyond the generalized Gauss-Newton matrix.

With c the loss's gradient in the outputs, held fixed, the Hessian of L is the GGN plus the Hessian of the residual
r = cᵀ f. Every rule's operator is affine in its parameter, z = A θ + …, with A made of the operator's other inputs. So
where no use of θ feeds another, the Hessian of r in θ is Σ_{a,b} A_aᵀ H_ab A_b over θ's uses, H_ab = ∂²r/∂z_a∂z_b; and

    diag = Σ_a Σ_i (A_aᵀ e_i) ⊙ (Σ_b A_bᵀ H_ba e_i),

one second backward per component i of a layer's *output* for all samples at once: `out` for a linear layer on vectors
instead of `out·in`. Where the parameter has fewer elements p than z has components (convolutions on large images,
biases), (A e_p)ᵀ H (A e_p) costs one per element, for all samples at once. Where z enters f piecewise linearly, H is
found to be zero by a single one, if the operators do not say so by themselves (ReLU nets: `flatness`). BackPACK
propagates the residuals' square roots instead (Dangel et al. 2020, appendix A.3): that needs each operator's second
derivative by hand, and as many columns as all curved layers together have outputs.

Rules whose output channels touch separate parts of the parameter need only H's entries within a channel; then all
channels of a position share one product.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.errors import EngineError
from curvature_engine.flatness import is_piecewise_affine
from curvature_engine.judgement import random_cotangent
from curvature_engine.losses import accumulation_dtype
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.probe import Code, predicts, scaled
from curvature_engine.speculation import answer, answers
from curvature_engine.tape import backward
from curvature_engine.watched import Derivation

Blocks = Iterator[tuple[int, Tensor]]


class Residuals:
    """The residual's Hessian diagonals under one cotangent c, as blocks (first sample, [n, *p]) that add up."""

    def __init__(self, outputs: Tensor, cotangent: Tensor, budget_bytes: int) -> None:
        self._outputs, self._cotangent, self._budget_bytes = outputs, cotangent, budget_bytes

    def of_uses(self, uses: Sequence[PreparedUse], like: Tensor) -> Blocks:
        """Of a parameter with closed forms, none of whose uses feeds another."""
        with torch.enable_grad():
            edges = [p.tap.edges[0] for p in uses]
            found = _differentiate(self._outputs, edges, self._cotangent, create_graph=True)
            arrived = [
                (p, p.arranged_gradient(shaped))
                for p, g in zip(uses, found, strict=True)
                if (shaped := p.tap.shaped([g])[0]) is not None
            ]
        uses = [p for p, _ in arrived]
        curved = [(p, g) for p, g in arrived if g.requires_grad and not self._is_flat(g.flatten(1), uses)]
        if not curved:
            return
        if like.numel() < sum(g[0].numel() for _, g in curved):
            yield 0, self._by_elements(curved, like)
            return
        for prepared, g in curved:
            yield from self._of_one_use(prepared, g, [p for p, _ in curved], like)

    def of_tensors(self, tensors: Sequence[Tensor], *, per_sample: bool) -> Blocks:
        """Of any parameter, one second backward per element (and sample; else the sum over samples as one block)."""
        if not per_sample:
            yield 0, self._elementwise(tensors, self._cotangent)[None]
            return
        restricted = torch.zeros_like(self._cotangent)
        for n in range(len(restricted)):
            restricted[n] = self._cotangent[n]
            yield n, self._elementwise(tensors, restricted.clone())[None]
            restricted[n] = 0

    @staticmethod
    def _by_elements(uses: Sequence[tuple[PreparedUse, Tensor]], like: Tensor) -> Tensor:
        """(A e_p)ᵀ H (A e_p) for every element p, [N, *p]."""
        N = len(uses[0][1])
        edges = [p.tap.edges[0] for p, _ in uses]
        with torch.enable_grad():
            free = [torch.zeros_like(g).requires_grad_() for _, g in uses]
            pairs = [(p, f) for (p, _), f in zip(uses, free, strict=True)]
            # Linear in `free`, so its derivatives are A's columns.
            gradients = ClosedForm(pairs, like, N, 1).gradients(slice(None)).reshape(N, -1)
        diagonal = torch.zeros_like(gradients)
        for i in range(like.numel()):
            with torch.enable_grad():
                columns = torch.autograd.grad(gradients[:, i].sum(), free, retain_graph=True)
                scalar = torch.stack([(g * c).sum() for (_, g), c in zip(uses, columns, strict=True)]).sum()
            found = _differentiate(scalar, edges, torch.ones_like(scalar))
            for (p, _), c, h in zip(uses, columns, found, strict=True):
                if h is not None:
                    diagonal[:, i] += (_arranged(p, h) * c).flatten(1).sum(1)
        return diagonal.view(N, *like.shape).detach()

    def _of_one_use(self, prepared: PreparedUse, g: Tensor, others: Sequence[PreparedUse], like: Tensor) -> Blocks:
        N, flat = len(g), g.flatten(1)
        axis = _channel_axis(prepared, others)
        for components in _groups(g, axis):
            column = torch.zeros_like(flat, requires_grad=False)
            column[:, components] = 1
            images = self._images(flat, components, others, axis)
            left = ClosedForm([(prepared, column.view(g.shape))], like, N, self._budget_bytes)
            right = ClosedForm(images, like, N, self._budget_bytes)
            size = min(left.block, right.block)
            for first in range(0, N, size):
                block = slice(first, first + size)
                yield first, left.gradients(block) * right.gradients(block)

    @staticmethod
    def _is_flat(flat: Tensor, uses: Sequence[PreparedUse]) -> bool:
        """Whether H is zero: then so is its product with a random vector, and hardly otherwise."""
        found = _differentiate(flat, [p.tap.edges[0] for p in uses], random_cotangent(flat))
        return not any(answer(g.any()) for g in found if g is not None)

    def _images(
        self, flat: Tensor, components: Sequence[int], uses: Sequence[PreparedUse], axis: int | None
    ) -> list[tuple[PreparedUse, Tensor]]:
        """H e_i at every use; of the channels' components i, each one's own channel alone."""
        edges = [p.tap.edges[0] for p in uses]
        gathered: Tensor | None = None
        for channel, i in enumerate(components):
            with torch.enable_grad():
                scalar = flat[:, i].sum()
            found = _differentiate(scalar, edges, torch.ones_like(scalar))
            images = [(p, _arranged(p, g)) for p, g in zip(uses, found, strict=True) if g is not None]
            if axis is None:
                return images
            own = images[0][1]
            gathered = torch.zeros_like(own) if gathered is None else gathered
            gathered.select(axis + 1, channel).copy_(own.select(axis + 1, channel))
        assert gathered is not None
        return [(uses[0], gathered)]

    def _elementwise(self, tensors: Sequence[Tensor], cotangent: Tensor) -> Tensor:
        like = tensors[0]
        diagonal = torch.zeros(like.numel(), dtype=accumulation_dtype(like.dtype), device=like.device)
        with torch.enable_grad():
            found = [g for g in _differentiate(self._outputs, tensors, cotangent, create_graph=True) if g is not None]
            total = torch.stack(found).sum(0).reshape(-1) if found else diagonal
        for i in range(like.numel()) if total.requires_grad else ():
            parts = _differentiate(total[i], tensors, torch.ones_like(total[i]))
            diagonal[i] = sum(float(g.reshape(-1)[i]) for g in parts if g is not None)
        return diagonal.view(like.shape)


def affine(uses: Sequence[PreparedUse]) -> bool:
    """Whether all outputs are affine in the parameter: no use feeds another, and none is of a derived tensor."""
    return not any(isinstance(p.use.watched.index, Derivation) for p in uses) and not feed_each_other(uses)


class Bends(NamedTuple):
    """Where second derivatives of the residual are found, by the numbers of the taps.

    Attributes:
        strays: where they reach rows of other samples than first derivatives told.
        curved: where there are any: elsewhere H is zero, with every tap (ReLU nets have it nowhere).
    """

    strays: set[int]
    curved: set[int]


def find_bends(outputs: Tensor, cotangent: Tensor, uses: Sequence[PreparedUse]) -> Bends:
    """The taps with second derivatives, and those where these pair rows unexpectedly.

    Where a layer's outputs are zero a product's gradient is, too: no row was heard, or a sample's only, and the second
    derivatives may still pair any two. They are linear in the cotangent, so the probe's code tells them apart: with
    every sample's cotangent scaled by its own power of two, each row of H v must come back scaled by its own sample's.

    Where the operators prove that there are none, nothing is asked.
    """
    taps = {p.tap_index: p for p in uses}
    if is_piecewise_affine(outputs, {p.tap.edges[0].node for p in taps.values()}):
        return Bends(set(), set())
    images = _images_at(outputs, cotangent, taps)
    alive = answers([image.any() for image in images.values()])
    plain = {i: image for (i, image), some in zip(images.items(), alive, strict=True) if some}
    code = Code.for_gradients(len(outputs), list(plain.values()))
    strays: set[int] = set()
    for factors in code.factors(outputs.device) if plain else ():
        found = _images_at(outputs, scaled(cotangent, factors), taps)
        strays |= {
            number
            for number, image in plain.items()
            if not predicts(taps[number].tap, taps[number].attribution, image, found[number], factors, all_listed=False)
        }
    return Bends(strays, set(plain))


def _images_at(outputs: Tensor, cotangent: Tensor, taps: Mapping[int, PreparedUse]) -> dict[int, Tensor]:
    """H v at each tap that has any, for one random v over all taps together."""
    edges = [p.tap.edges[0] for p in taps.values()]
    with torch.enable_grad():
        found = _differentiate(outputs, edges, cotangent, create_graph=True)
        products = [
            (g * random_cotangent(g, seed=number)).sum()
            for number, g in zip(taps, found, strict=True)
            if g is not None and g.requires_grad
        ]
        scalar = torch.stack([p.double() for p in products]).sum() if products else None
    if scalar is None:
        return {}
    images = _differentiate(scalar, edges, torch.ones_like(scalar))
    shaped = {number: p.tap.shaped([h])[0] for (number, p), h in zip(taps.items(), images, strict=True)}
    return {number: h for number, h in shaped.items() if h is not None}


def feed_each_other(uses: Sequence[PreparedUse]) -> bool:
    """Whether the output of one use reaches another use (recurrence): then z is not linear in the parameter."""
    nodes = {p.tap.edges[0].node for p in uses}
    if len(nodes) < 2:
        return False
    seen = set()
    waiting = [below for node in nodes for below, _ in node.next_functions if below is not None]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            return True
        if node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions if below is not None]
    return False


def _channel_axis(prepared: PreparedUse, others: Sequence[PreparedUse]) -> int | None:
    """The axis whose entries can share products; entries of several uses, or of a gather, may meet in one element."""
    rule = prepared.tap.rule
    if rule is None or len(others) > 1 or prepared.use.watched.index is not None:
        return None
    return rule.channel_axis


def _groups(g: Tensor, axis: int | None) -> list[list[int]]:
    """Components of g [N, …] that share one product: all channels of a position, or each by itself."""
    index = torch.arange(g[0].numel()).view(g.shape[1:])
    if axis is None:
        return [[i] for i in range(index.numel())]
    channels = index.movedim(axis, -1)
    found: list[list[int]] = channels.reshape(-1, channels.shape[-1]).tolist()
    return found


def _arranged(prepared: PreparedUse, g: Tensor) -> Tensor:
    shaped = prepared.tap.shaped([g])[0]
    assert shaped is not None
    return prepared.arranged_gradient(shaped)


def _differentiate(
    outputs: Tensor, targets: Sequence[Any], cotangent: Tensor, *, create_graph: bool = False
) -> list[Tensor | None]:
    """`backward`, which here needs operators that can be differentiated twice.

    Raises:
        EngineError: `unsupported_model`.
    """
    try:
        return backward(outputs, targets, cotangent, create_graph=create_graph)
    except EngineError as error:
        if error.code != "unsupported_model":
            raise
        raise EngineError(
            error.code,
            error.message.replace("cannot be differentiated", "cannot be differentiated twice"),
            param=error.param,
            remedy="leave diag_hessian and batch_diag_hessian out",
        ) from error
