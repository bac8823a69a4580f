"""BackPACK 1.7.1 as a peer: every extension on every module that it supports, N > 1."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tests.engine.models import images, sequences, targets_for, tokens, vectors
from torch import nn

import curvature_engine as engine
from curvature_engine.losses import LossSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from backpack import backpack, extend
    from backpack import extensions as peer
    from backpack.core.derivatives.bcewithlogitsloss import BCELossWithLogitsDerivatives
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives
    from backpack.core.derivatives.mseloss import MSELossDerivatives
    from backpack.custom_module.pad import Pad
    from backpack.custom_module.permute import Permute
    from backpack.custom_module.reduce_tuple import ReduceTuple
    from backpack.custom_module.scale_module import ScaleModule
    from backpack.custom_module.slicing import Slicing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TOLERANCE = 1e-10
DRAWS = 3


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    losses: tuple[str, ...] = ("cross_entropy", "mse")


def norm(kind, channels):
    module = kind(channels)
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(module.weight)
    return module


def volumes(channels=1):
    return (torch.randn(4, channels, 3, 4, 4, dtype=torch.float64),)


NETS = {
    "linear": Net(
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=False), nn.Tanh()),
            *(nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3)),
        ),
        vectors,
    ),
    "binary": Net(lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 1)), vectors, ("bce_with_logits",)),
    "activations": Net(
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, 4), nn.LogSigmoid(), nn.Linear(4, 4), nn.ELU()),
            *(nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 3)),
        ),
        vectors,
    ),
    "conv1d": Net(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 4, 2), nn.Sigmoid(), nn.ConvTranspose1d(4, 2, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(18, 3)),
        ),
        lambda: sequences(3, 5),
    ),
    "pool1d": Net(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 4, 2, padding=1), nn.Tanh(), nn.MaxPool1d(2), nn.ConvTranspose1d(4, 2, 2)),
            *(nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 3)),
        ),
        lambda: sequences(3, 5),
    ),
    "conv2d": Net(
        lambda: nn.Sequential(
            *(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 2, dilation=2, padding=1)),
            *(nn.AvgPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3, 3)),
        ),
        images,
    ),
    "grouped": Net(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.Sigmoid()),
            *(nn.Flatten(), nn.Linear(50, 3)),
        ),
        images,
    ),
    "conv3d": Net(
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 2, 2), nn.Sigmoid(), nn.ConvTranspose3d(2, 1, 2, dilation=2), nn.Flatten()),
            nn.Linear(100, 3),
        ),
        volumes,
    ),
    "pool3d": Net(
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 2, 2, padding=1), nn.Tanh(), nn.MaxPool3d(2), nn.ConvTranspose3d(2, 2, 2)),
            *(nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3)),
        ),
        volumes,
    ),
    "adaptive1d": Net(
        lambda: nn.Sequential(nn.Conv1d(3, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)),
        lambda: sequences(3, 5),
    ),
    "adaptive2d": Net(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        images,
    ),
    "adaptive3d": Net(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 3)),
        volumes,
    ),
    "extra_axes": Net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3)), sequences
    ),
    "embedding": Net(
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)), tokens
    ),
    "batchnorm1d": Net(
        lambda: nn.Sequential(nn.Linear(5, 4), norm(nn.BatchNorm1d, 4), nn.ReLU(), nn.Linear(4, 3)), vectors
    ),
    "batchnorm2d": Net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), norm(nn.BatchNorm2d, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        images,
    ),
    "batchnorm3d": Net(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), norm(nn.BatchNorm3d, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3)
        ),
        volumes,
    ),
    "custom": Net(
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), ScaleModule(0.3), nn.Sigmoid(), Pad((1, 2), "constant", 0.5), nn.Linear(7, 4)),
            *(nn.Tanh(), Slicing((slice(None), slice(0, 3))), nn.Linear(3, 3), nn.Identity()),
        ),
        vectors,
    ),
    "rnn": Net(
        lambda: nn.Sequential(
            *(nn.RNN(4, 3, batch_first=True), ReduceTuple(index=0), Permute(0, 2, 1), nn.Flatten(), nn.Linear(9, 3)),
        ),
        sequences,
    ),
    "lstm": Net(
        lambda: nn.Sequential(
            *(nn.LSTM(4, 3, batch_first=True), ReduceTuple(index=0), Permute(0, 2, 1), nn.Flatten(), nn.Linear(9, 3)),
        ),
        sequences,
    ),
    "extra_outputs": Net(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)),
        lambda: sequences(3, 6),
        ("cross_entropy",),
    ),
}


@dataclass(frozen=True)
class Peer:
    make: Callable
    read: Callable
    options: tuple = ()


BACKPACK = (("approximation", "backpack"),)
SAMPLED = (("mc_samples", DRAWS),)
FIRST_ORDER = {
    "batch_grad": Peer(peer.BatchGrad, lambda p: p.grad_batch),
    "batch_l2": Peer(peer.BatchL2Grad, lambda p: p.batch_l2),
    "sum_grad_squared": Peer(peer.SumGradSquared, lambda p: p.sum_grad_squared),
    "variance": Peer(peer.Variance, lambda p: p.variance),
}
PEERS = {
    **FIRST_ORDER,
    "diag_ggn_exact": Peer(peer.DiagGGNExact, lambda p: p.diag_ggn_exact),
    "diag_ggn_mc": Peer(lambda: peer.DiagGGNMC(DRAWS), lambda p: p.diag_ggn_mc, SAMPLED),
    "batch_diag_ggn_exact": Peer(peer.BatchDiagGGNExact, lambda p: p.diag_ggn_exact_batch),
    "batch_diag_ggn_mc": Peer(lambda: peer.BatchDiagGGNMC(DRAWS), lambda p: p.diag_ggn_mc_batch, SAMPLED),
    "sqrt_ggn_exact": Peer(peer.SqrtGGNExact, lambda p: p.sqrt_ggn_exact),
    "sqrt_ggn_mc": Peer(lambda: peer.SqrtGGNMC(mc_samples=DRAWS), lambda p: p.sqrt_ggn_mc, SAMPLED),
    "diag_hessian": Peer(peer.DiagHessian, lambda p: p.diag_h),
    "batch_diag_hessian": Peer(peer.BatchDiagHessian, lambda p: p.diag_h_batch),
    "kfac": Peer(lambda: peer.KFAC(DRAWS), lambda p: p.kfac, BACKPACK + SAMPLED),
    "kflr": Peer(peer.KFLR, lambda p: p.kflr, BACKPACK),
    "kfra": Peer(peer.KFRA, lambda p: p.kfra, BACKPACK),
}
KRONECKER = ("kfac", "kflr", "kfra")
LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce_with_logits": nn.BCEWithLogitsLoss}
DERIVATIVES = {
    "cross_entropy": CrossEntropyLossDerivatives,
    "mse": MSELossDerivatives,
    "bce_with_logits": BCELossWithLogitsDerivatives,
}

# What BackPACK lists, but refuses or gets wrong: (net, extension) → why.
GROUPS = "Kronecker factors only without groups"
AXES = "Kronecker factors only for two-dimensional inputs of linear layers"
REFUSED = {
    ("binary", "kfra"): "no summed Hessian of binary cross-entropy",
    **{("grouped", extension): GROUPS for extension in KRONECKER},
    **{("extra_axes", extension): AXES for extension in KRONECKER},
    **{("embedding", extension): AXES for extension in KRONECKER},
}
WRONG = {("grouped", "batch_l2"): "not the squared norm of its own individual gradients"}


def tables():
    """(net, extension, loss) that BackPACK lists: of first-order quantities, only layers with parameters count."""
    for net, case in NETS.items():
        modules = list(case.make())
        for extension, entry in PEERS.items():
            known = entry.make()._BackpropExtension__module_extensions
            needed = [m for m in modules if extension not in FIRST_ORDER or list(m.parameters())]
            for loss in case.losses:
                losses = [] if extension in FIRST_ORDER else [LOSSES[loss]]
                if {*map(type, needed), *losses} <= known.keys():
                    yield net, extension, loss


LISTED = list(tables())
CASES = [case for case in LISTED if case[:2] not in {**REFUSED, **WRONG}]


def build(net):
    torch.manual_seed(0)
    case = NETS[net]
    module, inputs = case.make().double().eval(), case.inputs()
    return module, inputs


def targets_of(module, inputs, loss):
    outputs = module(*inputs)
    if loss == "bce_with_logits":
        return torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(1)).double()
    return targets_for(outputs, loss)


@pytest.fixture(autouse=True)
def _double_by_default():
    """BackPACK makes some of its matrices in the default format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def drawn_targets(loss, outputs, targets, reduction):
    """What the engine draws, read off its columns."""
    bound = LossSpec.parse(loss, reduction).bind(outputs, targets)
    scores = [bound.sampled_column(0, m) * bound.Z**0.5 for m in range(DRAWS)]
    if loss == "cross_entropy":
        return [s.argmin(1) for s in scores]
    if loss == "mse":
        return [outputs.detach() - s / 2 for s in scores]
    return [(outputs.detach().sigmoid() - s).round() for s in scores]


def requests_of(net, loss):
    return [(e, PEERS[e]) for n, e, given in CASES if (n, given) == (net, loss)]


@cache
def ours(net, loss, reduction):
    module, inputs = build(net)
    requests = [{"name": name, "options": dict(entry.options)} for name, entry in requests_of(net, loss)]
    script = torch.jit.trace(module, inputs, check_trace=False)
    targets = targets_of(module, inputs, loss)
    return engine.analyze(script, inputs, targets, requests, loss=loss, reduction=reduction)


@cache
def theirs(net, loss, reduction):
    """{extension: {parameter: result}}, with our draws in the place of BackPACK's."""
    module, inputs = build(net)
    targets = targets_of(module, inputs, loss)
    draws = torch.stack(drawn_targets(loss, module(*inputs), targets, reduction))
    module, criterion = extend(module), extend(LOSSES[loss](reduction=reduction))
    entries = requests_of(net, loss)
    with pytest.MonkeyPatch.context() as patch:
        likelihood = SimpleNamespace(sample=lambda sample_shape: draws)
        patch.setattr(DERIVATIVES[loss], "_make_distribution", lambda self, outputs: likelihood)
        with backpack(*(entry.make() for _, entry in entries)):
            criterion(module(*inputs), targets).backward()
    parameters = dict(module.named_parameters())
    return {name: {n: entry.read(p) for n, p in parameters.items()} for name, entry in entries}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("net", "extension", "loss"), CASES)
def test_equals_backpack(net, extension, loss, reduction):
    group, expected = ours(net, loss, reduction)[extension], theirs(net, loss, reduction)[extension]
    for parameter, found in expected.items():
        mine = group[parameter]
        pairs = zip(mine[: len(found)], found, strict=True) if extension in KRONECKER else [(mine, found)]
        for a, b in pairs:
            if extension.startswith("sqrt_ggn"):  # a column's sign is of no consequence
                a, b = a.abs(), b.abs()
            assert a.shape == b.shape
            assert (a - b).abs().max() <= TOLERANCE * b.abs().max(), parameter


@pytest.mark.parametrize(("net", "extension", "loss"), [case for case in LISTED if case[:2] in REFUSED])
def test_backpack_still_refuses(net, extension, loss):
    module, inputs = build(net)
    targets = targets_of(module, inputs, loss)
    module, criterion = extend(module), extend(LOSSES[loss]())
    with pytest.raises(NotImplementedError), backpack(PEERS[extension].make()):
        criterion(module(*inputs), targets).backward()


def test_backpack_still_contradicts_itself_on_norms_of_grouped_convolutions():
    module, inputs = build("grouped")
    targets = targets_of(module, inputs, "mse")
    ours = engine.analyze(torch.jit.script(module), inputs, targets, ["batch_l2"], loss="mse")["batch_l2"]
    module, criterion = extend(module), extend(nn.MSELoss())
    with backpack(peer.BatchGrad(), peer.BatchL2Grad()):
        criterion(module(*inputs), targets).backward()
    weight = module[0].weight
    squares = weight.grad_batch.flatten(1).square().sum(1)
    assert not torch.allclose(weight.batch_l2, squares)
    torch.testing.assert_close(ours["0.weight"], squares, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("net", ["linear", "conv1d", "conv2d", "conv3d", "embedding", "batchnorm2d", "custom"])
def test_subsampling_equals_backpack(net, loss):
    samples = [3, 0, 3]
    module, inputs = build(net)
    targets = targets_of(module, inputs, loss)
    names = ["batch_grad", "sqrt_ggn_exact"]
    requests = [{"name": e, "options": {"subsampling": samples}} for e in names]
    script = torch.jit.trace(module, inputs, check_trace=False)
    ours = engine.analyze(script, inputs, targets, requests, loss=loss)
    module, criterion = extend(module), extend(LOSSES[loss]())
    with backpack(peer.BatchGrad(subsampling=samples), peer.SqrtGGNExact(subsampling=samples)):
        criterion(module(*inputs), targets).backward()
    for parameter, tensor in module.named_parameters():
        torch.testing.assert_close(ours["batch_grad"][parameter], tensor.grad_batch, rtol=1e-10, atol=1e-12)
        root = ours["sqrt_ggn_exact"][parameter]
        torch.testing.assert_close(root.abs(), tensor.sqrt_ggn_exact.abs(), rtol=1e-10, atol=1e-12)
