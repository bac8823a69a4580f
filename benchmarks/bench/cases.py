"""A net with a batch: what everybody is given."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.bench.nets import NETS, Net
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where, and with which numbers."""

    device: torch.device
    dtype: torch.dtype

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """One net with `classes` outputs on one batch of N random samples."""

    name: str
    N: int
    classes: int
    place: Place

    @property
    def net(self) -> Net:
        return NETS[self.name]

    @property
    def positions(self) -> int:
        return self.net.positions

    @cached_property
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.net.make(self.classes).to(self.place.device, self.place.dtype).eval()

    @cached_property
    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.N, *self.net.shape)
        if self.positions > 1:
            return torch.randint(self.classes, shape, generator=generator).to(self.place.device)
        return torch.randn(shape, generator=generator).to(self.place.device, self.place.dtype)

    @cached_property
    def targets(self) -> Tensor:
        if self.positions > 1:  # the next token
            return self.inputs.roll(-1, 1)
        return torch.randint(self.classes, (self.N,), generator=torch.Generator().manual_seed(2)).to(self.place.device)

    @property
    def of_images(self) -> bool:
        return len(self.net.shape) == 3

    @property
    def loss(self) -> dict[str, Any]:
        """The engine's name of it: the mean over all samples and positions."""
        options = {"class_axis": "last"} if self.positions > 1 else {}
        return {"name": "cross_entropy", "options": options}

    @property
    def columns(self) -> int:
        """Of the loss Hessian's square root, one a class and position."""
        return self.classes * self.positions

    def copy(self) -> nn.Module:
        """A module of a peer's own, which may hang hooks on it."""
        return copy.deepcopy(self.module)

    def contribution(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of some of the samples, divided by what the whole batch's is."""
        summed = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
        return summed / (self.N * self.positions)


class ClassesSecond(nn.Module):
    """Logits [N, T, C] as [N, C, T], where `nn.CrossEntropyLoss` looks for classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).transpose(1, 2)
