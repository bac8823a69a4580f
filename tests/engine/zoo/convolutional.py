"""Convolutional networks: residual, dense, inverted bottlenecks, squeeze-and-excite, U-shaped, and along time."""

import torch
import torch.nn.functional as F
from tests.engine.zoo.entry import CLASSES, Entry, images, sequences, settled
from torch import nn
from torch.nn.utils import parametrizations


def batchnorm(channels):
    return settled(nn.BatchNorm2d(channels))


class Head(nn.Module):
    """Mean over positions, then classes."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """He et al. 2016: two convolutions beside a shortcut, which has one of its own where sizes change."""

    def __init__(self, width_in, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = batchnorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = batchnorm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), batchnorm(width))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce, self.bn1 = nn.Conv2d(width, 2, 1, bias=False), batchnorm(2)
        self.conv, self.bn2 = nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), batchnorm(2)
        self.expand, self.bn3 = nn.Conv2d(2, width, 1, bias=False), batchnorm(width)

    def forward(self, x):
        out = F.relu(self.bn1(self.reduce(x)))
        out = F.relu(self.bn2(self.conv(out)))
        return F.relu(self.bn3(self.expand(out)) + x)


class PreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = batchnorm(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.conv2 = batchnorm(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class DenseLayer(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.norm, self.conv = batchnorm(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]):
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """Huang et al. 2017: every layer reads all before it; a transition halves."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(2 + 2 * i, 2) for i in range(2)])
        self.norm, self.transition = batchnorm(6), nn.Conv2d(6, 3, 1)
        self.head = Head(3)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        x = self.transition(F.relu(self.norm(torch.cat(features, 1))))
        return self.head(F.avg_pool2d(x, 2))


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        s = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.up(F.relu(self.down(s))))


class InvertedBottleneck(nn.Module):
    """Sandler et al. 2018, Howard et al. 2019: expand, depthwise, project, with squeeze-and-excite."""

    def __init__(self, width, excite=False, kernel=3):
        super().__init__()
        inner = width * 2
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), batchnorm(inner)
        self.depthwise = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False)
        self.bn2 = batchnorm(inner)
        self.excite = SqueezeExcite(inner) if excite else nn.Identity()
        self.project, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), batchnorm(width)
        self.act = nn.Hardswish() if excite else nn.ReLU6()

    def forward(self, x):
        y = self.act(self.bn1(self.expand(x)))
        y = self.excite(self.act(self.bn2(self.depthwise(y))))
        return x + self.bn3(self.project(y))


class LayerNorm2d(nn.Module):
    """Over channels, which stand second."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: depthwise, then an MLP on channels last, and a scale per channel."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = settled(nn.LayerNorm(width, eps=1e-6))
        self.pw1, self.pw2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pw2(F.gelu(self.pw1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 2, stride=2), LayerNorm2d(3)
        self.block, self.head = ConvNeXtBlock(3), Head(3)

    def forward(self, x):
        return self.head(self.block(self.norm(self.stem(x))))


class GlobalResponse(nn.Module):
    """ConvNeXt V2's normalisation: by each channel's norm over positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), Head(3)
        self.gamma, self.beta = nn.Parameter(torch.rand(1, 1, 1, 3)), nn.Parameter(torch.rand(1, 1, 1, 3))

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return self.head((self.gamma * (x * n) + self.beta + x).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Ronneberger et al. 2015: down, up by a transposed convolution, and across."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.down(x))
        b = torch.tanh(self.middle(F.max_pool2d(a, 2)))
        return self.join(torch.cat([self.up(b), a], 1))


class Upsampling(nn.Module):
    """A feature pyramid: interpolation and addition, then pixels shuffled."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.lateral, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(1, CLASSES, 2)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        b = F.interpolate(self.b(a), scale_factor=2.0, mode="bilinear", align_corners=False)
        y = F.pixel_shuffle(F.silu(b + self.lateral(a)), 2)
        return self.head(y).mean((2, 3))


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass, groups are shuffled."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1, groups=2), Head(4)

    def forward(self, x):
        x = torch.cat([x, x * x], 1)
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.b(F.relu(self.a(right)))], 1)
        n, c, h, w = y.size()
        return self.head(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, (1, 3), padding=(0, 1))
        self.c, self.head = nn.Conv2d(2, 2, (3, 1), padding=(1, 0)), Head(6)

    def forward(self, x):
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        return self.head(torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(pooled))], 1))


class Temporal(nn.Module):
    """Bai et al. 2018: dilated causal convolutions with weight norm, cut at the end."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv1d(4, 3, 2, padding=1, dilation=1))
        self.second = parametrizations.weight_norm(nn.Conv1d(3, 3, 2, padding=2, dilation=2))
        self.shortcut, self.out = nn.Conv1d(4, 3, 1), nn.Linear(3, CLASSES)

    def forward(self, x):
        x = x.transpose(1, 2)
        y = F.relu(self.first(x)[:, :, :-1])
        y = F.relu(self.second(y)[:, :, :-2])
        return self.out(F.relu(y + self.shortcut(x))[:, :, -1])


class WaveNet(nn.Module):
    """van den Oord et al. 2016: gated units, with skips."""

    def __init__(self):
        super().__init__()
        self.filters = nn.ModuleList([nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2)])
        self.gates = nn.ModuleList([nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2)])
        self.skips = nn.ModuleList([nn.Conv1d(4, CLASSES, 1) for _ in range(2)])

    def forward(self, x):
        x = x.transpose(1, 2)
        total = torch.zeros(x.size(0), 3, 1, dtype=x.dtype)
        for filter_, gate, skip in zip(self.filters, self.gates, self.skips):  # noqa: B905 (scripted)
            y = torch.tanh(filter_(x)) * torch.sigmoid(gate(x))
            total = total + skip(y)[:, :, -1:]
            x = x[:, :, -y.size(2) :] + y
        return total.squeeze(2)


class DepthwiseSeparable1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth = nn.Conv1d(4, 8, 3, padding="same", groups=4)
        self.point, self.act = nn.Conv1d(8, 4, 1), nn.PReLU(4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.act(self.point(self.depth(x.transpose(1, 2)))).amax(2))


class Generator(nn.Module):
    """Transposed convolutions from a code to an image."""

    def __init__(self):
        super().__init__()
        self.code = nn.Linear(4, 8)
        self.a, self.b = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), nn.ConvTranspose2d(3, 1, 2)
        self.norm = settled(nn.InstanceNorm2d(3, affine=True))

    def forward(self, x):
        x = self.code(x).view(-1, 2, 2, 2)
        return torch.tanh(self.b(F.leaky_relu(self.norm(self.a(x)), 0.2)))


class Standardised(nn.Conv2d):
    """Qiao et al. 2019: weights of zero mean and unit variance."""

    def forward(self, x):
        weight = self.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        std = weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (weight - mean) / std, self.bias, padding=1)


class StandardisedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = Standardised(2, 4, 3), settled(nn.GroupNorm(2, 4)), Head(4)

    def forward(self, x):
        return self.head(F.elu(self.norm(self.conv(x))))


class GeneralisedMean(nn.Module):
    """Pooling by a learned power."""

    def __init__(self):
        super().__init__()
        self.conv, self.power, self.fc = nn.Conv2d(2, 3, 3), nn.Parameter(torch.tensor([2.5])), nn.Linear(3, CLASSES)

    def forward(self, x):
        x = F.softplus(self.conv(x)).pow(self.power).mean((2, 3))
        return self.fc(x.pow(1.0 / self.power))


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
    )


def mobilenet():
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), InvertedBottleneck(3), Head(3))


ENTRIES = [
    Entry("LeNet", lenet, images(), chain=True),
    Entry("ResNet, basic blocks", lambda: nn.Sequential(BasicBlock(2, 3, stride=2), Head(3)), images()),
    Entry("ResNeXt bottleneck", lambda: nn.Sequential(nn.Conv2d(2, 4, 1), Bottleneck(4), Head(4)), images()),
    Entry("ResNet, pre-activation", lambda: nn.Sequential(PreActivation(2), Head(2)), images()),
    Entry("DenseNet", DenseNet, images()),
    Entry("MobileNet V2", mobilenet, images()),
    Entry("MobileNet V3", lambda: nn.Sequential(InvertedBottleneck(2, excite=True, kernel=5), Head(2)), images(),
          hessian=False),
    Entry("ConvNeXt", ConvNeXt, images()),
    Entry("ConvNeXt V2 response norm", GlobalResponse, images()),
    Entry("U-Net", UNet, images(), loss="mse"),
    Entry("feature pyramid", Upsampling, images()),
    Entry("ShuffleNet", Shuffle, images()),
    Entry("Inception", Inception, images()),
    Entry("temporal convolutions, weight norm", Temporal, sequences(5), ways=("traced", "exported")),
    Entry("WaveNet", WaveNet, sequences(5)),
    Entry("depthwise separable in time, PReLU", DepthwiseSeparable1d, sequences(5)),
    Entry("generator", Generator, lambda: (torch.randn(3, 4, dtype=torch.float64),), loss="mse"),
    Entry("weight standardisation", StandardisedNet, images()),
    Entry("generalised-mean pooling", GeneralisedMean, images()),
    Entry(
        "convolutions in space and time",
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, CLASSES)),
        lambda: (torch.randn(3, 1, 2, 3, 2, dtype=torch.float64),),
        chain=True,
    ),
]  # fmt: skip
