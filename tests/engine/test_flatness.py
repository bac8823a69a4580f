"""Which nets are piecewise affine by their operators: what is listed has no second derivative, what bends is not."""

import pytest
import torch
import torch.nn.functional as F
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import flatness, residuals

LISTED = flatness._TOGETHER | flatness._APART | flatness._NUMERATOR | flatness._IN_EVAL_MODE
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KERNEL = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
STATISTICS = torch.linspace(-0.5, 0.5, 3, dtype=torch.float64), torch.linspace(0.5, 2.0, 3, dtype=torch.float64)


def normed(z, *, training=False):
    mean, variance = (s.clone() for s in STATISTICS)
    return F.batch_norm(z, mean, variance, training=training)


FLAT = {
    # Of z [2, 3, 4, 6].
    "View": lambda z: z.view(2, -1),
    "UnsafeView": lambda z: torch.matmul(z, WEIGHT),
    "Transpose": lambda z: z.transpose(1, 3),
    "T": lambda z: z.view(6, -1).t(),
    "Permute": lambda z: z.permute(3, 0, 2, 1),
    "Squeeze": lambda z: z[:, :1].squeeze(1),
    "Unsqueeze": lambda z: z.unsqueeze(1),
    "Expand": lambda z: z[:, :1].expand(-1, 3, -1, -1) + z,
    "Slice": lambda z: z[:, 1:],
    "Select": lambda z: z[:, 1],
    "Split": lambda z: z.split(2, 2)[1],
    "SplitWithSizes": lambda z: z.split([1, 3], 2)[1],
    "Unbind": lambda z: z.unbind(1)[2],
    "Cat": lambda z: torch.cat([z, z.flip(1)], 1),
    "Stack": lambda z: torch.stack([z, z.flip(1)], 1),
    "Clone": lambda z: z.clone(),
    "Alias": lambda z: torch.ops.aten.alias(z),
    "ToCopy": lambda z: z.float().double(),
    "Index": lambda z: z[:, torch.tensor([0, 2, 2])],
    "IndexSelect": lambda z: z.index_select(1, torch.tensor([0, 2, 2])),
    "Gather": lambda z: z.gather(1, z.detach().argsort(1)),
    "Flip": lambda z: z.flip(1),
    "Roll": lambda z: z.roll(1, 1),
    "Repeat": lambda z: z.repeat(1, 2, 1, 1),
    "Unfold": lambda z: z.unfold(2, 2, 1),
    "PixelShuffle": lambda z: F.pixel_shuffle(z.view(2, 12, 2, 3), 2),
    "PixelUnshuffle": lambda z: F.pixel_unshuffle(z, 2),
    "Tril": lambda z: z.tril(),
    "Triu": lambda z: z.triu(),
    "ConstantPadNd": lambda z: F.pad(z, (1, 1)),
    "ReflectionPad1D": lambda z: F.pad(z.flatten(1, 2), (1, 1), "reflect"),
    "ReflectionPad2D": lambda z: F.pad(z, (1, 1, 1, 1), "reflect"),
    "ReflectionPad3D": lambda z: F.pad(z.view(2, 3, 2, 2, 6), (1, 1, 1, 1, 1, 1), "reflect"),
    "ReplicationPad1D": lambda z: F.pad(z.flatten(1, 2), (1, 1), "replicate"),
    "ReplicationPad2D": lambda z: F.pad(z, (1, 1, 1, 1), "replicate"),
    "ReplicationPad3D": lambda z: F.pad(z.view(2, 3, 2, 2, 6), (1, 1, 1, 1, 1, 1), "replicate"),
    "Im2Col": lambda z: F.unfold(z, 2),
    "Col2Im": lambda z: F.fold(F.unfold(z, 2), (4, 6), 2),
    "Add": lambda z: z + z.flip(1),
    "Sub": lambda z: z - z.flip(1),
    "Rsub": lambda z: torch.rsub(z, z.flip(1)),
    "Neg": lambda z: -z,
    "Sum": lambda z: z.sum(2) + z.sum(),
    "Mean": lambda z: z.mean((2, 3)) + z.mean(),
    "Cumsum": lambda z: z.cumsum(1),
    "MaskedFill": lambda z: z.masked_fill(z > 0, 2.0),
    "Where": lambda z: torch.where(z > 0, z, z.flip(1)),
    "AvgPool2D": lambda z: F.avg_pool2d(z, 2),
    "AvgPool3D": lambda z: F.avg_pool3d(z, 2),
    "AdaptiveAvgPool2D": lambda z: F.adaptive_avg_pool2d(z, 3),
    "AdaptiveAvgPool3D": lambda z: F.adaptive_avg_pool3d(z, 2),
    "UpsampleNearest1D": lambda z: F.interpolate(z.flatten(1, 2), 9),
    "UpsampleNearest2D": lambda z: F.interpolate(z, (5, 9)),
    "UpsampleNearest3D": lambda z: F.interpolate(z.view(2, 3, 2, 2, 6), (3, 3, 9)),
    "UpsampleLinear1D": lambda z: F.interpolate(z.flatten(1, 2), 9, mode="linear"),
    "UpsampleBilinear2D": lambda z: F.interpolate(z, (5, 9), mode="bilinear"),
    "UpsampleTrilinear3D": lambda z: F.interpolate(z.view(2, 3, 2, 2, 6), (3, 3, 9), mode="trilinear"),
    "Relu": torch.relu,
    "LeakyRelu": F.leaky_relu,
    "Hardtanh": F.hardtanh,
    "Hardsigmoid": F.hardsigmoid,
    "Threshold": lambda z: F.threshold(z, 0.1, -1.0),
    "Hardshrink": F.hardshrink,
    "Softshrink": F.softshrink,
    "Clamp": lambda z: z.clamp(-0.5, 0.5) + z.clamp(-z.flip(1).abs(), z.roll(1, 1).abs()),
    "ClampMin": lambda z: z.clamp_min(0.1),
    "ClampMax": lambda z: z.clamp_max(0.1),
    "Abs": torch.abs,
    "Maximum": lambda z: torch.maximum(z, z.flip(1)),
    "Minimum": lambda z: torch.minimum(z, z.flip(1)),
    "Max": lambda z: z.max(1)[0] + z.max(),
    "Min": lambda z: z.min(1)[0] + z.min(),
    "Amax": lambda z: z.amax(1),
    "Amin": lambda z: z.amin(1),
    "MaxPool2DWithIndices": lambda z: F.max_pool2d(z, 2),
    "MaxPool3DWithIndices": lambda z: F.max_pool3d(z, 2),
    "AdaptiveMaxPool2D": lambda z: F.adaptive_max_pool2d(z, 2),
    "AdaptiveMaxPool3D": lambda z: F.adaptive_max_pool3d(z, 2),
    "Mul": lambda z: z * WEIGHT[:4] * (z > 0) * z.detach(),
    "Mm": lambda z: z.reshape(-1, 6).mm(WEIGHT) + WEIGHT.mm(z.reshape(6, -1)).view(-1, 6),
    "Bmm": lambda z: z.flatten(0, 1).bmm(WEIGHT.expand(6, 6, 6)),
    "Mv": lambda z: z.view(-1, 6).mv(WEIGHT[0]),
    "Addmm": lambda z: F.linear(z.view(-1, 6), WEIGHT, WEIGHT[0]),
    "Addmv": lambda z: torch.addmv(WEIGHT[0, :1], z.view(-1, 6), WEIGHT[0]),
    "Baddbmm": lambda z: torch.baddbmm(WEIGHT[:1, :1], z.flatten(0, 1), WEIGHT.expand(6, 6, 6)),
    "Convolution": lambda z: F.conv2d(z, KERNEL) + F.conv2d(KERNEL, z[:, :, :1, :1]).mean(),
    "PreluKernel": lambda z: F.prelu(z, STATISTICS[1]),
    "Embedding": lambda z: F.embedding(torch.tensor([0, 2, 2]), z.view(-1, 6)),
    "Div": lambda z: z / WEIGHT[:4],
    "NativeBatchNorm": normed,
}
BENT = {
    "square": lambda z: z * z,
    "product of two layers' outputs": lambda z: z * z.flip(1),
    "product with a gate": lambda z: z * torch.relu(z),
    "product of both factors from one place, far apart": lambda z: z.mean() * F.max_pool2d(torch.relu(z), 2),
    "inner product": lambda z: z.flatten(0, 1).bmm(z.flatten(0, 1).transpose(1, 2)),
    "matrix product": lambda z: z.view(4, -1).mm(z.view(4, -1).t()),
    "kernel made of the batch": lambda z: F.conv2d(z, z[:, :, :2, :2]),
    "weights made of the batch": lambda z: F.linear(z.view(-1, 6), z[0, 0]),
    "slope made of the batch": lambda z: F.prelu(z, z[0, :, 0, 0]),
    "denominator": lambda z: 1.0 / (z.abs() + 1.0),
    "division by itself": lambda z: z / (z.abs() + 1.0),
    "power": lambda z: z.pow(2),
    "root": lambda z: (z.abs() + 1.0).sqrt(),
    "softmax": lambda z: z.softmax(1),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "logsumexp": lambda z: z.logsumexp(1),
    "norm": lambda z: z.norm(dim=1),
    "standard deviation": lambda z: z.std(1),
    "product along an axis": lambda z: z.prod(1),
    "layer norm": lambda z: F.layer_norm(z, (6,)),
    "batch norm by the batch's own statistics": lambda z: normed(z, training=True),
    "attention": lambda z: torch._scaled_dot_product_attention_math(z, z, z)[0],
    "edit in place": lambda z: z.mul(1.0).mul_(z),
}


def made(function):
    """(z, f(z), with layers' outputs behind it)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    z = x + 0.0
    return z, function(z)


def names_behind(tensor):
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        found.add(node.name().rpartition("Backward")[0])
        waiting += [source for source, _ in node.next_functions if source is not None]
    return found


def bends(z, y):
    """Whether ∂²(cᵀ y)/∂z² times a vector is anywhere different from zero."""
    generator = torch.Generator().manual_seed(3)
    c, u = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, z))
    (g,) = torch.autograd.grad(y, z, c, create_graph=True)
    if not g.requires_grad:
        return False
    (h,) = torch.autograd.grad(g, z, u, allow_unused=True)
    return h is not None and bool(h.any())


@pytest.mark.parametrize("name", FLAT)
def test_what_is_listed_has_no_second_derivative(name):
    z, y = made(FLAT[name])
    assert name in names_behind(y)
    assert flatness.is_piecewise_affine(y, {z.grad_fn})
    if name != "Hardsigmoid":  # whose derivative torch cannot differentiate
        assert not bends(z, y)


def test_the_whole_list_is_tried():
    # ReshapeAlias is what some older programs' graphs call a view; cudnn's norm needs a GPU.
    assert set(FLAT) == LISTED - {"ReshapeAlias", "CudnnBatchNorm"}


@pytest.mark.parametrize("name", BENT)
def test_what_bends_is_not_taken_for_flat(name):
    z, y = made(BENT[name])
    assert bends(z, y)
    assert not flatness.is_piecewise_affine(y, {z.grad_fn})


def test_only_what_layers_enter_counts():
    z, y = made(lambda z: torch.relu(z) * 2.0)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = y * torch.softmax(weight, 0)
    assert flatness.is_piecewise_affine(y, {z.grad_fn})
    assert not flatness.is_piecewise_affine(y, {z.grad_fn, y.grad_fn.next_functions[1][0]})


def test_a_layer_that_is_reached_by_several_ways_is_met_in_all_of_them():
    """The longer way is the later one on one side, the earlier one on the other."""
    for turned in (False, True):

        def both(z, turned=turned):
            long = torch.relu(torch.relu(torch.relu(z)))
            pair = (z, long) if turned else (long, z)
            return (pair[0] + 1.0) * (pair[1] + 1.0)

        z, y = made(both)
        assert not flatness.is_piecewise_affine(y, {z.grad_fn})


class Residual(nn.Module):
    """Convolutions with norms, a way around them, pooling, and an activation of its own."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.slope, self.l = nn.BatchNorm2d(3), nn.PReLU(3), nn.Linear(12, 4)
        self.activation = activation
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x):
        h = F.max_pool2d(self.slope(self.norm(self.a(x))), 2)
        h = F.avg_pool2d(self.activation(h + self.b(h).abs()), 2)
        return self.l(h.flatten(1))


@pytest.mark.parametrize(("activation", "flat"), [(nn.ReLU(), True), (nn.Tanh(), False), (nn.ReLU6(), True)])
@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_the_diagonal_of_nets_that_are_and_are_not(activation, flat, way, monkeypatch):
    asked = []
    monkeypatch.setattr(residuals, "_images_at", lambda *a, images=residuals._images_at: asked.append(a) or images(*a))
    torch.manual_seed(0)
    module = Residual(activation).double().eval()
    inputs, targets = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1])
    script = torch.jit.script(module) if way == "scripted" else torch.jit.trace(module, inputs)
    result = engine.analyze(script, inputs, targets, ["diag_hessian", "batch_diag_hessian"])
    expected = Reference(module, (inputs,), targets, "cross_entropy", "mean").batch_diag_hessian()
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_diag_hessian"][parameter], value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result["diag_hessian"][parameter], value.sum(0), rtol=1e-10, atol=1e-13)
    assert (not asked) == flat
