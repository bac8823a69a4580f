"""One backward pass through a graph that is there.

`torch.autograd.grad` with a cotangent imports torch's symbolic shapes, and with them a computer algebra system: 47 MB
and a second that the first pass of a process would pay for comparing two shapes. So what it calls then is called here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import GradientEdge

_Run = Callable[..., tuple[Tensor | None, ...]]
_run: _Run | None = getattr(graph, "_engine_run_backward", None)  # torch's own, of which it promises nothing


def gradients(
    outputs: Tensor | GradientEdge,
    targets: Sequence[Any],
    cotangent: Tensor,
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """What a cotangent of the outputs, of their shape and dtype, brings to tensors and edges; None where nothing can.

    Raises:
        RuntimeError: where autograd cannot.
    """
    if _run is None:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            (outputs,),  # type: ignore[arg-type]
            tuple(targets),
            (cotangent,),
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        return found
    if _shape(outputs) != tuple(cotangent.shape):
        raise RuntimeError(f"the cotangent has shape {list(cotangent.shape)}, the outputs {list(_shape(outputs))}")
    return _run((outputs,), (cotangent,), retain_graph, create_graph, tuple(targets), True, accumulate_grad=False)


def _shape(outputs: Tensor | GradientEdge) -> tuple[int, ...]:
    if isinstance(outputs, Tensor):
        return tuple(outputs.shape)
    return tuple(outputs.node._input_metadata[outputs.output_nr].shape)
