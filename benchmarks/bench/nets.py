"""The nets that are measured: DeepOBS's 2C2D, 3C3D and All-CNN-C; a ResNet-18; a small GPT; an MLP for KFRA."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def two_c_two_d(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, classes)),
    )


def three_c_three_d(classes: int = 10) -> nn.Module:
    def pool() -> list[nn.Module]:  # TensorFlow's "same" padding
        return [nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)]

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), *pool()),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), *pool()),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), *pool(), nn.Flatten()),
        *(nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes)),
    )


def all_cnn_c(classes: int = 100) -> nn.Module:
    def convolution(before: int, after: int, kernel: int = 3, **options: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, **options), nn.ReLU()]

    def halving(channels: int) -> list[nn.Module]:
        return [nn.ZeroPad2d((0, 1, 0, 1)), *convolution(channels, channels, stride=2)]

    return nn.Sequential(
        *(*convolution(3, 96, padding=1), *convolution(96, 96, padding=1), *halving(96)),
        *(*convolution(96, 192, padding=1), *convolution(192, 192, padding=1), *halving(192)),
        *(*convolution(192, 192), *convolution(192, 192, 1), *convolution(192, classes, 1)),
        *(nn.AvgPool2d(6), nn.Flatten()),
    )


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(after), nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(after), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet_18(classes: int = 10) -> nn.Module:
    blocks, before = [], 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(before, after, stride), Block(after, after, 1)]
        before = after
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *blocks),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had been trained
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


class DecoderLayer(nn.Module):
    """Attention to what came before, then an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(N, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(N, T, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of a language model; its output layer is the embedding. Logits [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, context: int = 128, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(DecoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.out.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        # Positions get the batch's axis, so that peers which hook modules know whose they are.
        places = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        return self.out(self.norm(self.layers(self.token(tokens) + self.position(places))))


def gpt(classes: int = 1000) -> nn.Module:
    return GPT(classes)


def mlp(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes))


@dataclass(frozen=True)
class Net:
    """How to make it, one sample's shape, its classes; with positions, an output and a target at each."""

    title: str
    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    positions: int = 1


NETS = {
    "2c2d": Net("2C2D", two_c_two_d, (1, 28, 28)),
    "3c3d": Net("3C3D", three_c_three_d, (3, 32, 32)),
    "allcnnc": Net("All-CNN-C", all_cnn_c, (3, 32, 32), 100),
    "resnet18": Net("ResNet-18", resnet_18, (3, 32, 32)),
    "gpt": Net("GPT", gpt, (128,), 1000, 128),
    "mlp": Net("MLP", mlp, (784,)),
}


def parameters_of(net: str) -> int:
    return sum(p.numel() for p in NETS[net].make(NETS[net].classes).parameters())
