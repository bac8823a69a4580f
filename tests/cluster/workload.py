"""What the clients of a chaos run ask for: jobs of many kinds, each a function of (seed, number)."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLASSES = 3
_KINDS = ("small",) * 12 + ("long",) * 5 + ("large batch", "bad targets", "bad parameters")
_COLUMNS = 1000
"""Of a long job: half a second of work."""
_QUANTITIES = (
    ["variance"],
    ["grad", "batch_l2"],
    ["batch_grad", "sum_grad_squared"],
    ["diag_ggn_exact"],
    ["diag_ggn_mc", "variance"],
    ["kfac"],
    ["kflr", "diag_ggn_mc"],
    [{"name": "kfac", "label": "kfac4", "options": {"mc_samples": 4}}, "batch_grad"],
)
_WHOLE_BATCH_QUANTITIES = (["diag_hessian"], ["batch_dot"], ["gradient_noise_scale", "batch_diag_ggn_mc"])
_REFUSALS = {"bad targets": "invalid_targets", "bad parameters": "no_parameters"}


@dataclass(frozen=True)
class Task:
    """One job to submit. `refusal` is the code that it must fail with, by its own fault."""

    number: int
    model: Path
    batch: Any
    extensions: list[Any]
    options: dict[str, Any]
    parts: int = 0
    refusal: str | None = None


class Workload:
    """Makes tasks; the models are files that it writes once."""

    def __init__(self, folder: Path, seed: int, *, sharded_every: int = 10) -> None:
        self._seed, self._sharded_every = seed, sharded_every
        torch.manual_seed(seed)
        nets = {
            "mlp": nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
            "deep": nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, CLASSES)),
            "conv": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, CLASSES)),
            "wide": nn.Sequential(nn.Linear(1000, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
            "many": nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, _COLUMNS)),
        }
        self._models = {name: folder / f"{name}.pt" for name in nets}
        folder.mkdir(parents=True, exist_ok=True)
        for name, net in nets.items():
            torch.jit.save(torch.jit.script(net.eval()), self._models[name])

    def task(self, number: int) -> Task:
        """The task of a number."""
        choice = random.Random(f"{self._seed}/{number}")
        numbers = torch.Generator().manual_seed(choice.getrandbits(40))
        if self._sharded_every and number % self._sharded_every == self._sharded_every - 1:
            return self._over_data_set(number, choice, numbers)
        kind = choice.choice(_KINDS)
        name = {"large batch": "wide", "long": "many"}.get(kind) or choice.choice(["mlp", "deep", "conv"])
        options: dict[str, Any] = {"seed": number, "reduction": choice.choice(["mean", "sum"])}
        samples = {"large batch": 300, "long": 16}.get(kind) or choice.randint(2, 24)
        inputs, targets = _batch(name, samples, numbers)
        extensions = list(choice.choice(_QUANTITIES + _WHOLE_BATCH_QUANTITIES))
        if kind == "long":
            targets, extensions = torch.randn(samples, _COLUMNS, generator=numbers), ["diag_ggn_exact"]
            options["loss"] = "mse"
        elif kind == "bad targets":
            targets = targets + CLASSES
        elif kind == "bad parameters":
            options["parameters"] = "nowhere.*"
        elif choice.random() < 0.2:
            targets, options["loss"] = torch.randn(samples, CLASSES, generator=numbers), "mse"
        return Task(number, self._models[name], (inputs, targets), extensions, options, refusal=_REFUSALS.get(kind))

    def _over_data_set(self, number: int, choice: random.Random, numbers: torch.Generator) -> Task:
        name, parts = choice.choice(["mlp", "deep", "conv"]), choice.randint(2, 5)
        batches = [_batch(name, choice.randint(2, 12), numbers) for _ in range(parts)]
        options = {"seed": number, "reduction": choice.choice(["mean", "sum"])}
        return Task(number, self._models[name], batches, list(choice.choice(_QUANTITIES)), options, parts=parts)


def _batch(name: str, samples: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"conv": (1, 8, 8), "wide": (1000,), "many": (16,)}.get(name, (5,))
    inputs = torch.randn(samples, *shape, generator=numbers)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=numbers)
