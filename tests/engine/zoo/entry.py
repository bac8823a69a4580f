"""What a model of the zoo declares."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

N = 3
CLASSES = 3


@dataclass(frozen=True)
class Entry:
    """A model, its inputs, and what is expected of it.

    Attributes:
        ways: in which files of it are made: scripted, traced, exported.
        output: which of several outputs enters the loss.
        class_axis: of the logits, for language models [N, T, V].
        refused: the code of the error that it must end in, or None.
        chain: whether it is an nn.Sequential that KFRA supports.
        hessian: whether all its operators can be differentiated twice.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    ways: tuple[str, ...] = ("scripted", "traced", "exported")
    loss: str = "cross_entropy"
    output: str | int | None = None
    class_axis: int = 1
    refused: str | None = None
    chain: bool = False
    hessian: bool = True
    train: bool = False
    seed: int = 0
    losses: dict = field(default_factory=dict)

    def build(self):
        """The eager module in float64 and its inputs."""
        torch.manual_seed(self.seed)
        module, inputs = self.make().double(), self.inputs()
        return (module.train() if self.train else module.eval()), inputs


def vectors(features=4):
    return lambda: (torch.randn(N, features, dtype=torch.float64),)


def images(channels=2, size=4):
    return lambda: (torch.randn(N, channels, size, size, dtype=torch.float64),)


def sequences(length=4, features=4):
    return lambda: (torch.randn(N, length, features, dtype=torch.float64),)


def tokens(length=4, vocabulary=6):
    return lambda: (torch.randint(0, vocabulary, (N, length)),)


def together(*makers):
    return lambda: tuple(tensor for make in makers for tensor in make())


def settled(norm):
    """A normalisation layer as after training: its statistics and scales are no zeros and ones."""
    for name in ("running_mean", "weight", "bias"):
        if getattr(norm, name, None) is not None:
            nn.init.normal_(getattr(norm, name), mean=0.3)
    if getattr(norm, "running_var", None) is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm
