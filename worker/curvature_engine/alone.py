"""Whether what a part of a data set gives is what the same samples would give in the whole.

Nobody makes the whole batch, so nothing can be compared with it. But what depends on how many samples there are, or on
the samples beside one, shows in a part already: its first sample by itself must have the same outputs and the same
loss. A part of one sample, in which nothing is coupled, goes through the model twice over, and the two are probed.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product

import torch
from torch import Tensor

from curvature_engine.division import ATTEMPTS, candidate_axes, same_rows
from curvature_engine.errors import EngineError, lacks_memory
from curvature_engine.execution import map_tensors
from curvature_engine.judgement import judge
from curvature_engine.losses import BoundLoss, LossSpec
from curvature_engine.parts import whole_batch_required
from curvature_engine.products import exactly
from curvature_engine.program import Forward, Inputs, Parameter

RunForward = Callable[[Inputs, bool], Forward]
"""A forward pass, with a graph or without."""

_REMEDY = "remove operations across the batch axis, or give all samples as one batch"


def check_part(
    run: RunForward,
    spec: LossSpec,
    inputs: Inputs,
    targets: Tensor,
    whole: Forward,
    bound: BoundLoss,
    probed: Mapping[str, Parameter],
) -> bool:
    """Refuse a part whose samples are not what they would be in the whole.

    Args:
        run: the program's forward pass.
        spec: the loss.
        inputs: the part's.
        targets: the part's.
        whole: the part's forward pass.
        bound: the loss on it.
        probed: the parameters that a sample given twice is probed for; none where only outputs are wanted.

    Returns:
        Whether samples were, or will be, shown not to be coupled: False of one sample that the model takes only alone.

    Raises:
        EngineError: `whole_batch_required`, `coupled_samples`.
    """
    outputs, single = spec.select(whole.outputs).detach(), bound.N == 1
    _check_loss(spec, outputs, targets, bound)
    differs = False
    # An exported program may take two samples and more.
    sizes = (2,) if single else (1, 2) if bound.N > 2 else (1,)
    for count, axes in product(sizes, islice(candidate_axes(inputs, bound.N), ATTEMPTS)):
        try:
            forward = run(_resized(inputs, axes, count, repeat=single), single and bool(probed))
            found = spec.select(forward.outputs)
        except EngineError as error:
            if lacks_memory(error):
                raise
            continue
        if found.shape != (count, *outputs.shape[1:]) or forward.decisions != whole.decisions:
            continue
        if not _same(found.detach(), outputs):
            differs = True
            continue
        if single and probed:
            with exactly(found.device):
                judge(found, forward.tape, probed)
        return True
    if differs:
        raise whole_batch_required(
            "model",
            "the model returns other outputs for a sample in a batch of another size: they depend on the samples "
            "beside it, or on how many there are",
            _REMEDY,
        )
    return not single


def _check_loss(spec: LossSpec, outputs: Tensor, targets: Tensor, bound: BoundLoss) -> None:
    rows = [0, 0] if bound.N == 1 else [0]
    alone = spec.bind(outputs[rows], targets[rows], bound.first_sample)
    if not _same(alone.contributions(), bound.contributions()):
        raise whole_batch_required(
            "loss", "a sample has another loss in a batch of another size", "let it depend on its own outputs alone"
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether rows are the first ones expected (of one, it again and again), measured by all of them."""
    first = expected[: len(found)].expand_as(found)
    return same_rows(torch.cat([found, expected]), torch.cat([first, expected]))


def _resized(inputs: Inputs, axes: Sequence[int | None], count: int, *, repeat: bool) -> Inputs:
    """The first `count` samples, or the first one so many times."""
    order = iter(axes)

    def resize(tensor: Tensor) -> Tensor:
        axis = next(order)
        if axis is None:
            return tensor
        return torch.cat([tensor] * count, axis) if repeat else tensor.narrow(axis, 0, count).contiguous()

    found: Inputs = map_tensors(resize, inputs)
    return found
