"""Whether a net is piecewise affine in its layers' outputs, read off the operators on the way: then nothing bends.

Each operator listed here is piecewise affine in one of its tensors while the others stay as they are, some in all of
them together; autograd takes its derivative for constant on each piece. If every operator that passes the batch from
a layer on is one of these, and no product has two factors that layers enter, the outputs are piecewise affine in the
layers' outputs, whatever is in the batch: second derivatives in them are zero, and need not be asked for.
"""

from collections.abc import Set

from torch import Tensor
from torch.autograd.graph import Node


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOGETHER = _names(
    """
    View UnsafeView ReshapeAlias Transpose T Permute Squeeze Unsqueeze Expand Slice Select Split SplitWithSizes Unbind
    Cat Stack Clone Alias ToCopy Index IndexSelect Gather Flip Roll Repeat Unfold PixelShuffle PixelUnshuffle Tril Triu
    ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    Im2Col Col2Im
    Add Sub Rsub Neg Sum Mean Cumsum MaskedFill Where
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D
    Relu LeakyRelu Hardtanh Hardsigmoid Threshold Hardshrink Softshrink Clamp ClampMin ClampMax Abs Maximum Minimum
    Max Min Amax Amin MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D
    """
)
"""Piecewise affine in all of their tensors together."""
_APART = _names("Mul Mm Bmm Mv Addmm Addmv Baddbmm Convolution PreluKernel Embedding")
"""Affine, or piecewise affine, in one of their tensors while the others stay as they are."""
_NUMERATOR = _names("Div")
"""Affine in the first of their tensors."""
_IN_EVAL_MODE = _names("NativeBatchNorm CudnnBatchNorm")
"""As `_APART`, but for statistics of the batch itself."""


def is_piecewise_affine(outputs: Tensor, layers: Set[Node]) -> bool:
    """Whether the operators prove the outputs piecewise affine in what some nodes of their graph made, together."""
    if outputs.grad_fn is None:
        return True
    waiting: list[tuple[Node, bool]] = [(outputs.grad_fn, False)]
    seen: set[Node] = set()
    reached: set[Node] = set()
    """The nodes whose results a layer's output enters."""
    while waiting:
        node, complete = waiting.pop()
        if node in seen:
            continue
        sources = [source for source, _ in node.next_functions]
        if not complete:  # what it is made of comes first
            waiting.append((node, True))
            waiting += [(source, False) for source in sources if source is not None and source not in seen]
            continue
        seen.add(node)
        varying = [place for place, source in enumerate(sources) if source in reached]
        if varying and not _is_piecewise_affine(node, varying):
            return False
        if varying or node in layers:
            reached.add(node)
    return True


def _is_piecewise_affine(node: Node, varying: list[int]) -> bool:
    """Of one operator, in the tensors at some places among those that it is differentiable in."""
    name, _, overload = node.name().rpartition("Backward")
    if not overload.isdigit():
        return False
    if name in _TOGETHER:
        return True
    if name in _NUMERATOR:
        return varying == [0]
    if len(varying) > 1:
        return False
    return name in _APART or (name in _IN_EVAL_MODE and not node._saved_training)  # type: ignore[attr-defined]
