"""Images channels last: the same numbers, and where the program could tell the difference, channels first."""

import pytest
import torch
from tests.engine.checking import build, check, traced
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvature_engine as engine
from curvature_engine import layouts

CPU = torch.device("cpu")


@pytest.fixture
def every_format(monkeypatch):
    """Channels last in float64, too, in which numbers are held to brute force; and a count of the tensors taken."""
    monkeypatch.setattr(layouts, "_FORMATS", frozenset((torch.float32, torch.float64)))
    taken = []
    take = layouts.ChannelsLast.take

    def counting(self, tensor):
        result = take(self, tensor)
        taken.append(result)
        return result

    monkeypatch.setattr(layouts.ChannelsLast, "take", counting)
    return taken


class Net(nn.Module):
    """Convolutions, pooling, and then what `rest` makes of the images."""

    def __init__(self, rest, channels=2):
        super().__init__()
        self.a, self.b, self.rest = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 3, 3), rest
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        x = torch.max_pool2d(torch.tanh(self.a(x)), 2)
        return self.last(self.rest(torch.relu(self.b(x))))


class Viewed(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)


class EditedCopy(nn.Module):
    """An edit of a flattened image, which channels first is one of the image."""

    def forward(self, x):
        x = x * 1.5
        flat = x.flatten(1)
        flat.mul_(torch.tensor(2.0, dtype=flat.dtype))
        return flat + x.flatten(1)


class EditedImage(nn.Module):
    """An edit of an image, which channels first is one of what was flattened before."""

    def forward(self, x):
        x = x * 1.5
        flat = x.flatten(1)
        x.sigmoid_()
        return flat * flat


class EditedContiguous(nn.Module):
    """An edit of what `contiguous` returns, which channels first is the image itself."""

    def forward(self, x):
        x = x * 1.5
        same = x.contiguous()
        same.sigmoid_()
        return (x * same).flatten(1)


class EditedBefore(nn.Module):
    """An edit before anything was flattened."""

    def forward(self, x):
        x = x * 1.5
        x.sigmoid_()
        return x.flatten(1)


class AsksStrides(nn.Module):
    def forward(self, x):
        return x.flatten(1) * float(x.stride(1))


RESTS = {
    "flatten": nn.Flatten(),
    "view": Viewed(),
    "edited-copy": EditedCopy(),
    "edited-image": EditedImage(),
    "edited-contiguous": EditedContiguous(),
    "edited-before": EditedBefore(),
    "strides": AsksStrides(),
    "pooled": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "shuffled": nn.Sequential(nn.ChannelShuffle(3), nn.Unflatten(1, (3, 1)), nn.Flatten()),
}


def _used(norm):
    """A normalisation with statistics and weights that are not where they begin."""
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rest", RESTS)
def test_numbers_equal_brute_force(every_format, rest, channels):
    module, inputs = build(lambda: Net(RESTS[rest], channels), (5, channels, 8, 8))
    # A trace would hold the stride as a number.
    model = torch.jit.script(module) if rest == "strides" else traced(module, inputs)
    check(module, inputs, model, hessian=True)
    assert bool(every_format) == (rest != "strides")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
        lambda: nn.Conv2d(4, 8, (3, 2), dilation=2, padding=2, groups=4),
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: nn.Conv2d(4, 20, 3, padding="same"),
        lambda: nn.Conv2d(4, 6, 1),
        lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1, groups=2),
        lambda: nn.ConvTranspose2d(4, 4, 1, dilation=2, output_padding=(1, 0)),
        lambda: nn.GroupNorm(2, 4),
        lambda: _used(nn.BatchNorm2d(4)),
        lambda: _used(nn.BatchNorm2d(4, affine=False)),
        lambda: nn.PReLU(4),
    ],
)
def test_rules_equal_brute_force_on_such_images(every_format, make):
    module, inputs = build(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), make(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3)),
        (4, 2, 9, 9),
    )
    check(module, inputs, traced(module, inputs), hessian=True)
    assert every_format


class _PoolingBackwards(TorchDispatchMode):
    """Whether gradients come to pooling's backward channels last."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.max_pool2d_with_indices_backward.default:
            self.found.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("request_", ["grad", "diag_ggn_mc", "diag_ggn_exact", "diag_hessian"])
def test_a_flattened_images_gradient_comes_back_channels_last(every_format, request_):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).double()
    program, x = engine.load(torch.jit.script(net)), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    with _PoolingBackwards() as backwards:
        engine.analyze(program, x, torch.arange(4) % 3, [request_])
    assert every_format
    assert backwards.found
    assert all(backwards.found)


def test_batch_norm_in_training_mode_is_still_refused(every_format):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).train()
    with pytest.raises(engine.EngineError, match="batch normalisation runs in training mode"):
        engine.analyze(torch.jit.script(net), torch.randn(4, 2, 8, 8), torch.arange(4) % 3, ["grad"], eval=False)
    assert every_format


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_group_norms_parameters_alone_have_gradients(frozen, first):
    """Torch's own backward ends the process where the gradient of images channels last is not asked for."""
    torch.manual_seed(0)
    norm = [nn.GroupNorm(2, 4), nn.Tanh()] if first else [nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh()]
    module = nn.Sequential(*norm, nn.Flatten(), nn.Linear(120, 3)).eval()
    module[0].requires_grad_(first or not frozen)
    selected = [name for name, _ in module.named_parameters() if first or not name.startswith("0.")]
    x, y = torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2])
    for options in ({}, {"channels_last": True}):
        program = engine.load(torch.jit.script(module))
        result = engine.analyze(program, x, y, ["grad"], parameters=selected, **options)
        loss = nn.functional.cross_entropy(module(x.contiguous()), y)
        parameters = dict(module.named_parameters())
        expected = torch.autograd.grad(loss, [parameters[name] for name in selected])
        for name, gradient in zip(selected, expected, strict=True):
            torch.testing.assert_close(result["grad"][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_a_batch_norm_of_large_inputs_in_float32(mean):
    """Few samples are normalised at a time; what is far from zero keeps its digits.

    A float32 near 1e3 has a spacing of 6e-5, which is that of what is normalised, of a size of about one.
    """
    torch.manual_seed(0)
    norm = _used(nn.BatchNorm2d(3))
    norm.running_mean.fill_(mean)
    net = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * 150 * 150, 3))
    inputs, targets = mean + torch.randn(4, 3, 150, 150), torch.arange(4) % 3
    found = engine.analyze(torch.jit.script(net), inputs, targets, ["batch_grad"], verify=True)["batch_grad"]
    exact = engine.analyze(torch.jit.script(net.double()), inputs.double(), targets, ["batch_grad"])["batch_grad"]
    for name, tensor in exact.items():
        assert (found[name] - tensor).abs().max() < 1e-3 * tensor.abs().max(), name


def test_factors_equal_those_channels_first(every_format, monkeypatch):
    module, inputs = build(lambda: Net(nn.Flatten()), (5, 2, 8, 8))
    targets = torch.arange(5) % 3
    requests = [
        {"name": "kflr", "label": a, "options": {"approximation": a}} for a in ("expand", "reduce", "backpack")
    ] + ["kfra"]
    last = engine.analyze(traced(module, inputs), inputs, targets, requests)
    assert every_format
    monkeypatch.setattr(layouts, "_FORMATS", frozenset())
    first = engine.analyze(traced(module, inputs), inputs, targets, requests)
    for request in ("expand", "reduce", "backpack", "kfra"):
        for parameter, factors in first[request].items():
            for expected, actual in zip(factors, last[request][parameter], strict=True):
                if expected is not None:
                    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("rest", "edits"),
    [("edited-copy", True), ("edited-image", True), ("edited-contiguous", True), ("edited-before", False)],
)
def test_an_edit_that_would_show_goes_channels_first(every_format, rest, edits):
    module, inputs = build(lambda: Net(RESTS[rest]), (5, 2, 8, 8))
    program = engine.load(traced(module, inputs))
    targets = torch.arange(5) % 3
    engine.analyze(program, inputs, targets, ["batch_l2"])
    runs = len(every_format)
    engine.analyze(program, inputs, targets, ["batch_l2"])
    assert len(every_format) == (runs if edits else 2 * runs)


def test_the_caller_keeps_his_inputs():
    module, inputs = build(lambda: Net(nn.Flatten()), (5, 2, 8, 8))
    module, x = module.float(), inputs[0].float()
    before = x.clone(), x.stride()
    result = engine.analyze(module, x, torch.arange(5) % 3, ["outputs"])
    assert torch.equal(x, before[0])
    assert x.stride() == before[1]
    torch.testing.assert_close(result["outputs"], module(x).detach())


@pytest.mark.parametrize(
    ("device", "operators", "asks_layout", "expected"),
    [
        ("cpu", "conv2d max_pool2d flatten", False, True),
        ("cpu", "_convolution relu", False, True),
        ("cpu", "conv2d max_pool2d flatten", True, False),
        ("cuda", "conv2d max_pool2d flatten", False, False),
        ("cpu", "linear relu", False, False),
        ("cpu", "conv2d batch_norm", False, True),
        ("cpu", "conv2d native_batch_norm", False, False),
        ("cpu", "conv2d as_strided", False, False),
    ],
)
def test_it_is_for_programs_that_gain_and_cannot_tell(device, operators, asks_layout, expected):
    assert layouts.pays(torch.device(device), operators.split(), asks_layout=asks_layout) is expected
