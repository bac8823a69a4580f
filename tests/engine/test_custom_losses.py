"""A loss given as a TorchScript function: exact where it is convex, refused by name where it is not."""

import io

import pytest
import torch
import torch.nn.functional as F
from tests.engine.models import CASES, build
from tests.engine.reference import Reference
from tests.engine.test_losses import FIRST_ORDER, check
from tests.engine.test_monte_carlo import BATCHES, DRAWS, check_mean, mc
from tests.engine.test_table import error
from torch import Tensor, nn

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}


def focal_free(outputs: Tensor, targets: Tensor) -> Tensor:
    """Correlated squares, a log-sum-exp over everything, and torch's own losses: convex, and nowhere diagonal."""
    flat = outputs.flatten(1)
    difference = flat - targets.flatten(1)
    mixed = difference + 0.5 * difference.sum(1, keepdim=True)
    own = F.huber_loss(flat, torch.zeros_like(flat), reduction="none").sum(1)
    return mixed.square().sum(1) + torch.logsumexp(2.0 * flat, 1) + own


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.poisson_nll_loss(outputs, targets, reduction="none").flatten(1).sum(1)


def wavy(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.sin(3.0 * (outputs - targets)).flatten(1).sum(1)


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().flatten(1).sum(1)


def branching(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = (outputs - targets).square()
    if bool(loss.sum() > 0):
        loss *= 2.0
    return loss.flatten(1).sum(1)


def centred(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - outputs.mean(0) - targets).square().flatten(1).sum(1)


def paired(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1) + 1e-6 * (outputs * outputs.roll(2, 0)).flatten(1).sum(1)


def scalar(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets + torch.rand_like(outputs)).square().flatten(1).sum(1)


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.detach() - targets).flatten(1).sum(1)


def single(outputs: Tensor) -> Tensor:
    return outputs.sum(1)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * self.weight).sum(1)


def peer(function):
    def reduced(f, t, reduction):
        terms = function(f, t)
        return terms.mean() if reduction == "mean" else terms.sum()

    return reduced


def real(outputs):
    return torch.randn(outputs.shape, dtype=outputs.dtype, generator=torch.Generator().manual_seed(1))


def labels(outputs):
    return torch.arange(len(outputs)) % outputs.shape[1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("function", "targets", "model"),
    [
        (focal_free, real, "mlp"),
        (focal_free, real, "cnn"),
        (focal_free, real, "extra_axis"),
        (cross_entropy, labels, "mlp"),
        (branching, real, "mlp"),
        (poisson, lambda f: real(f).abs(), "extra_axis"),
        (Weighted(), real, "mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_equals_brute_force(function, targets, model, reduction):
    module, inputs = build(BY_NAME[model])
    y = targets(module(*inputs))
    asked = ["batch_loss", *FIRST_ORDER, "diag_ggn_exact", "kflr"]
    result = engine.analyze(
        torch.jit.script(module), inputs, y, asked, loss=torch.jit.script(function), reduction=reduction
    )
    check(result, Reference(module, inputs, y, peer(function), reduction))
    assert result.info["loss_name"] == "custom"


def test_sampled_columns_are_unbiased_within_four_standard_errors():
    module, inputs = build(BY_NAME["mlp"])
    program, loss = engine.load(torch.jit.script(module)), torch.jit.script(focal_free)
    y, M = real(module(*inputs)), DRAWS // BATCHES
    exact = engine.analyze(program, inputs, y, ["diag_ggn_exact"], loss=loss)["diag_ggn_exact"]
    runs = [
        engine.analyze(program, inputs, y, [mc("diag_ggn_mc", M)], loss=loss, seed=seed)["diag_ggn_mc"]
        for seed in range(BATCHES)
    ]
    for parameter, expected in exact.items():
        check_mean(torch.stack([run[parameter] for run in runs]), expected)


def test_a_function_comes_as_itself_as_bytes_as_a_path_or_by_name(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    y, function = real(module(*inputs)), torch.jit.script(focal_free)
    path = tmp_path / "loss.pt"
    function.save(str(path))
    buffer = io.BytesIO()
    torch.jit.save(function, buffer)
    named = {"name": "custom", "function": str(path), "options": {}}
    values = [
        engine.analyze(module, inputs, y, ["batch_grad"], loss=loss)["batch_grad"]["0.weight"]
        for loss in (function, path, path.read_bytes(), buffer.getvalue(), named)
    ]
    assert all(torch.equal(value, values[0]) for value in values)


def refused(code, loss, match, extensions=("batch_grad",), y=real):
    module, inputs = build(BY_NAME["mlp"])
    with pytest.raises(engine.EngineError, match=match) as caught:
        engine.analyze(module, inputs, y(module(*inputs)), list(extensions), loss=loss)
    assert (caught.value.code, caught.value.param) == (code, "loss")
    assert caught.value.remedy


def test_a_loss_that_is_not_convex_has_gradients_and_no_ggn():
    loss = torch.jit.script(wavy)
    refused("unsupported_loss", loss, "not convex in the outputs: its Hessian has the eigenvalue -", ["diag_ggn_mc"])
    module, inputs = build(BY_NAME["mlp"])
    y = real(module(*inputs))
    result = engine.analyze(module, inputs, y, ["batch_loss", *FIRST_ORDER], loss=loss)
    check(result, Reference(module, inputs, y, peer(wavy), "mean"), second_order=False)


@pytest.mark.parametrize(
    ("function", "code", "match"),
    [
        (paired, "coupled_samples", "couples samples"),
        (centred, "coupled_samples", "couples samples"),
        (scalar, "unsupported_loss", r"one floating-point number per sample, \[4\]; got \[\]"),
        (noisy, "unsupported_operator", "in the loss function: operator aten::rand_like"),
        (detached, "unsupported_loss", "does not depend on the outputs"),
        (single, "unsupported_loss", r"takes \(outputs, targets\); this one takes \(outputs\)"),
    ],
)
def test_functions_that_are_no_loss(function, code, match):
    refused(code, torch.jit.script(function), match)


def test_a_function_that_rejects_the_targets():
    refused(
        "unsupported_loss",
        torch.jit.script(absolute),
        "in the loss function: it rejected",
        y=lambda f: torch.randn(4, 7),
    )


@pytest.mark.parametrize("loss", [b"hello", {"name": "custom", "function": "absent.pt"}])
def test_files_that_are_no_loss(loss):
    refused("unsupported_loss", loss, "no TorchScript file|no file absent.pt")


def test_the_name_alone_is_unknown():
    refused("unknown_loss", "custom", "there is no loss 'custom'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_in_lower_precision_makes_no_convex_loss_concave(dtype):
    module, inputs = build(BY_NAME["mlp"])
    y = labels(module(*inputs))
    exact = engine.analyze(module, inputs, y, ["diag_ggn_exact"], loss=torch.jit.script(cross_entropy))
    low = engine.analyze(
        module.to(dtype), (inputs[0].to(dtype),), y, ["diag_ggn_exact"], loss=torch.jit.script(cross_entropy)
    )
    for parameter, value in exact["diag_ggn_exact"].items():
        assert error(low["diag_ggn_exact"][parameter].double(), value) <= (1e-4 if dtype == torch.float32 else 0.1)


def test_nan_in_one_sample_stays_there():
    module, inputs = build(BY_NAME["mlp"])
    y = real(module(*inputs))
    y[1] = float("nan")
    result = engine.analyze(
        module, inputs, y, ["batch_loss", "batch_grad", "diag_ggn_mc"], loss=torch.jit.script(focal_free)
    )
    assert torch.isnan(result["batch_loss"]).tolist() == [False, True, False, False]
    assert torch.isfinite(result["batch_grad"]["2.weight"][[0, 2, 3]]).all()
    assert any("nan" in warning for warning in result.warnings)


def test_a_loss_without_curvature_says_so():
    module, inputs = build(BY_NAME["mlp"])
    result = engine.analyze(module, inputs, real(module(*inputs)), ["diag_ggn_exact"], loss=torch.jit.script(absolute))
    assert all(torch.all(value == 0) for value in result["diag_ggn_exact"].values())
    assert any("second derivatives are zero" in warning for warning in result.warnings)
