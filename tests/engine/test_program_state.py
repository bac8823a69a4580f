"""What a program keeps must not go from one run to the next, and its Python-level steps are TorchScript's own."""

import math
from typing import Dict, List, NamedTuple, Tuple  # noqa: UP035 (TorchScript reads these)

import pytest
import torch
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class InList(nn.Module):
    state: List[torch.Tensor]  # noqa: UP006

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.state = [torch.zeros(3)]

    def forward(self, x):
        self.state[0].add_(x[0])
        return self.l(x + self.state[0])


class InDict(nn.Module):
    state: Dict[str, torch.Tensor]  # noqa: UP006

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.state = {"a": torch.zeros(3)}

    def forward(self, x):
        self.state["a"].add_(x[0])
        return self.l(x + self.state["a"])


class InTuple(nn.Module):
    state: Tuple[torch.Tensor, int]  # noqa: UP006

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.state = (torch.zeros(3), 1)

    def forward(self, x):
        self.state[0].add_(x[0])
        return self.l(x + self.state[0])


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.register_buffer("whole", torch.zeros(2, 3))
        self.register_buffer("part", self.whole[1])

    def forward(self, x):
        self.part.add_(1.0)
        return self.l(x + self.whole.sum(0))


@pytest.mark.parametrize("module", [InList, InDict, InTuple, Aliased])
def test_edits_of_what_a_module_keeps_end_with_the_run(module):
    script = torch.jit.script(module().eval())
    program = engine.load(script)
    first, second = (engine.analyze(program, X, Y, ["outputs"])["outputs"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, script(X))


class Counting(nn.Module):
    """A generator of pseudo-random numbers that lives on the overflow of 64-bit integers."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        state = 12345
        for _ in range(20):
            state = state * 6364136223846793005 + 1442695040888963407
            state = state ^ (state >> 31)
            state = -state
        power = 7**30
        return self.l(x) * (state % 1000 + float(power % 10))


class Floating(nn.Module):
    """Infinities and NaN where Python would raise."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 7)

    def forward(self, x):
        big, zero = float(x.size(0)) * 300.0, float(x.size(0) - 4)
        values = [math.exp(big), 1.0 / zero, -1.0 / zero, zero / zero, big**big, (zero - 2.0) ** 0.5, big // zero]
        return self.l(x) * torch.tensor(values)


def test_floating_point_numbers_overflow_instead_of_failing():
    script = torch.jit.script(Floating().eval())
    targets = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(
        engine.analyze(script, X, targets, ["outputs"])["outputs"], script(X), rtol=0, atol=0, equal_nan=True
    )


def test_whole_numbers_wrap_at_64_bits():
    script = torch.jit.script(Counting().eval())
    assert torch.equal(engine.analyze(script, X, Y, ["outputs"])["outputs"], script(X))


class Formatting(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        text = "{0.__class__.__init__.__globals__} {} {x!r} {}".format(x.size(0), 2.5)  # noqa: F524, F525
        if x.size(0) > 0:
            raise RuntimeError(text)
        return self.l(x)


def test_a_format_string_reaches_no_attributes():
    with pytest.raises(engine.EngineError) as caught:
        engine.analyze(torch.jit.script(Formatting().eval()), X, Y, ["grad"])
    assert "{0.__class__.__init__.__globals__} 4 {x!r} 2.5" in caught.value.message


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x, y):
        return self.l(x * y)


def test_inputs_may_come_as_a_named_tuple():
    script = torch.jit.script(TwoInputs().eval())
    result = engine.analyze(script, Pair(X, X), Y, ["outputs"])
    assert torch.equal(result["outputs"], script(X, X))


class ByAttribute(nn.Module):
    """What the batch made comes back by an attribute."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.state = torch.zeros(1)

    def forward(self, x):
        self.state = torch.tanh(self.l(x))
        return self.out(torch.tanh(self.l(torch.tanh(self.l(self.state)))))


class ByAnotherName(nn.Module):
    """What the batch made goes into a list by one name, and comes back by another."""

    def __init__(self):
        super().__init__()
        self.l, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        own: list[torch.Tensor] = []
        lists = [own]
        lists[0].append(torch.tanh(self.l(x)))
        return self.out(torch.tanh(self.l(torch.tanh(self.l(own[0])))))


@pytest.mark.parametrize("make", [ByAttribute, ByAnotherName])
def test_what_the_batch_made_is_known_by_whatever_way_it_comes_back(make):
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(4, 4, dtype=torch.float64)
    targets = torch.randn(4, 3, dtype=torch.float64)
    result = engine.analyze(torch.jit.script(module), x, targets, ["batch_grad"], loss="mse")["batch_grad"]
    for parameter, expected in Reference(module, (x,), targets, "mse", "mean").batch_grad().items():
        torch.testing.assert_close(result[parameter], expected, rtol=1e-10, atol=1e-13)
