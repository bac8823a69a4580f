"""A data set in parts gives what one batch of all its samples gives."""

import pytest
import torch
from tests.engine.losses import LOSS_CASES
from tests.engine.models import CASES, N, targets_for, torchscript
from tests.engine.sharding import EVERYTHING, FIRST_ORDER, HESSIAN, check_equal, in_parts

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}
LOSSES = {case.id: case for case in LOSS_CASES}


def build(case, count=7):
    """A model, and a batch of `count` samples: several of its own batches, one after another."""
    torch.manual_seed(0)
    module = case.make()
    batches = [case.inputs() for _ in range(-(-count // N))]
    inputs = tuple(torch.cat(each)[:count] for each in zip(*batches, strict=True))
    module = module.double().eval()
    with torch.no_grad():
        module(*inputs)
    return module, inputs


BATCH_WIDE = ("if_and_loop",)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in BATCH_WIDE])
def test_parts_give_the_whole_batch_s_results(name, tmp_path):
    module, inputs = build(BY_NAME[name])
    program = engine.load(torchscript(module, inputs, BY_NAME[name].ways[0]))
    targets = targets_for(module(*inputs), "cross_entropy")
    requests = [*EVERYTHING, *([] if name in ("cnn", "residual_batchnorm", "convolutions") else HESSIAN)]
    whole = engine.analyze(program, inputs, targets, requests, loss="cross_entropy", seed=3)
    check_equal(
        whole, *in_parts(program, inputs, targets, requests, (3, 1, 2, 1), tmp_path, loss="cross_entropy", seed=3)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
def test_every_loss(case, reduction, tmp_path):
    module, inputs, targets = case.build()
    program = engine.load(torch.jit.script(module))
    requests = EVERYTHING if case.second_order else FIRST_ORDER
    options = {"loss": case.request, "reduction": reduction, "seed": 5}
    whole = engine.analyze(program, inputs, targets, requests, **options)
    check_equal(whole, *in_parts(program, inputs, targets, requests, (1, len(targets) - 1), tmp_path, **options))
