"""BackPACK 1.7.1 as a peer, where it can run the eager model."""

import warnings

import pytest
import torch
from tests.engine.models import CASES, build, targets_for
from torch import nn

import curvature_engine as engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from backpack import backpack, extend
    from backpack import extensions as peer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BY_NAME = {case.name: case for case in CASES}
NETS = {
    "mlp": BY_NAME["mlp"],
    "cnn": BY_NAME["cnn"],
    "convolutions_1d": BY_NAME["convolutions_1d"],
    "convolutions_3d": BY_NAME["convolutions_3d"],
}
PEERS = {
    "batch_grad": (lambda: peer.BatchGrad(), lambda p: p.grad_batch),
    "batch_l2": (lambda: peer.BatchL2Grad(), lambda p: p.batch_l2),
    "sum_grad_squared": (lambda: peer.SumGradSquared(), lambda p: p.sum_grad_squared),
    "variance": (lambda: peer.Variance(), lambda p: p.variance),
    "diag_ggn_exact": (lambda: peer.DiagGGNExact(), lambda p: p.diag_ggn_exact),
    "batch_diag_ggn_exact": (lambda: peer.BatchDiagGGNExact(), lambda p: p.diag_ggn_exact_batch),
    "diag_hessian": (lambda: peer.DiagHessian(), lambda p: p.diag_h),
    "batch_diag_hessian": (lambda: peer.BatchDiagHessian(), lambda p: p.diag_h_batch),
    "sqrt_ggn_exact": (lambda: peer.SqrtGGNExact(), lambda p: p.sqrt_ggn_exact),
    "kflr": (lambda: peer.KFLR(), lambda p: p.kflr),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("extension", PEERS)
@pytest.mark.parametrize("name", NETS)
def test_equals_backpack(name, extension, loss, reduction):
    module, inputs = build(NETS[name])
    targets = targets_for(module(*inputs), loss)
    request = {"name": extension, "options": {"approximation": "backpack"} if extension == "kflr" else {}}
    ours = engine.analyze(torch.jit.script(module), inputs, targets, [request], loss=loss, reduction=reduction)
    module = extend(module)
    criterion = extend((nn.MSELoss if loss == "mse" else nn.CrossEntropyLoss)(reduction=reduction))
    make, read = PEERS[extension]
    with backpack(make()):
        criterion(module(*inputs), targets).backward()
    for parameter, tensor in module.named_parameters():
        theirs, mine = read(tensor), ours[extension][parameter]
        pairs = [(mine, theirs)] if extension != "kflr" else list(zip(mine[: len(theirs)], theirs, strict=True))
        for a, b in pairs:
            if extension == "sqrt_ggn_exact":  # a column's sign is of no consequence
                a, b = a.abs(), b.abs()
            assert (a - b).abs().max() <= 1e-10 * b.abs().max(), parameter


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", NETS)
def test_subsampling_equals_backpack(name, loss):
    samples = [3, 0, 3]
    module, inputs = build(NETS[name])
    targets = targets_for(module(*inputs), loss)
    requests = [{"name": e, "options": {"subsampling": samples}} for e in ("batch_grad", "sqrt_ggn_exact")]
    ours = engine.analyze(torch.jit.script(module), inputs, targets, requests, loss=loss)
    module = extend(module)
    criterion = extend((nn.MSELoss if loss == "mse" else nn.CrossEntropyLoss)())
    with backpack(peer.BatchGrad(subsampling=samples), peer.SqrtGGNExact(subsampling=samples)):
        criterion(module(*inputs), targets).backward()
    for parameter, tensor in module.named_parameters():
        torch.testing.assert_close(ours["batch_grad"][parameter], tensor.grad_batch, rtol=1e-10, atol=1e-12)
        root = ours["sqrt_ggn_exact"][parameter]
        torch.testing.assert_close(root.abs(), tensor.sqrt_ggn_exact.abs(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("extension", PEERS)
def test_binary_cross_entropy_equals_backpack(extension, reduction):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 1)).double()
    inputs, targets = torch.randn(7, 5).double(), torch.randint(0, 2, (7, 1)).double()
    request = {"name": extension, "options": {"approximation": "backpack"} if extension == "kflr" else {}}
    criterion = nn.BCEWithLogitsLoss(reduction=reduction)
    ours = engine.analyze(torch.jit.script(module), inputs, targets, [request], loss=criterion)
    make, read = PEERS[extension]
    module, criterion = extend(module), extend(criterion)
    with backpack(make()):
        criterion(module(inputs), targets).backward()
    for parameter, tensor in module.named_parameters():
        theirs, mine = read(tensor), ours[extension][parameter]
        pairs = [(mine, theirs)] if extension != "kflr" else list(zip(mine[: len(theirs)], theirs, strict=True))
        for a, b in pairs:
            assert (a - b).abs().max() <= 1e-10 * b.abs().max(), parameter
