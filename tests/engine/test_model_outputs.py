"""Models that return tuples or dictionaries: the loss says which entry."""

from typing import NamedTuple

import pytest
import torch
from tests.engine.reference import Reference
from tests.engine.test_table import TOLERANCE, error
from torch import Tensor, nn

import curvature_engine as engine

X = torch.randn(5, 3).double()
Y = torch.tensor([0, 1, 0, 1, 1])
EXTENSIONS = ["batch_grad", "diag_ggn_exact"]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return h, self.b(h)


class Named(Pair):
    def forward(self, x) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        return {"hidden": h, "logits": self.b(h), "counts": torch.ones(5, dtype=torch.long)}


class Fields(NamedTuple):
    hidden: Tensor
    logits: Tensor


class Record(Pair):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return Fields(h, self.b(h))


class Logits(Pair):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize(("kind", "output"), [(Pair, 1), (Pair, -1), (Record, 1), (Named, "logits")])
def test_the_entry_named_enters_the_loss(kind, output, way):
    module = kind().double()
    script = torch.jit.script(module) if way == "scripted" else torch.jit.trace(module, X, strict=False)
    loss = {"name": "cross_entropy", "options": {"output": output}}
    result = engine.analyze(script, X, Y, [*EXTENSIONS, "outputs"], loss=loss)
    plain = Logits().double()
    plain.load_state_dict(module.state_dict())
    reference = Reference(plain, (X,), Y, "cross_entropy", "mean")
    torch.testing.assert_close(result["outputs"], reference.outputs.detach())
    for extension in EXTENSIONS:
        for parameter, expected in reference.expected(extension).items():
            assert error(result[extension][parameter], expected) <= TOLERANCE


def test_what_does_not_reach_the_entry_has_no_gradient():
    module = Pair().double()
    loss = {"name": "mse", "options": {"output": 0}}
    result = engine.analyze(torch.jit.script(module), X, torch.randn(5, 4).double(), ["batch_grad"], loss=loss)
    assert torch.all(result["batch_grad"]["b.weight"] == 0)
    assert torch.all(result["batch_grad"]["a.weight"].flatten(1).any(1))


@pytest.mark.parametrize(
    ("kind", "output", "match"),
    [
        (Pair, None, 'the model returned a tuple of 2; .*"output": 0'),
        (Pair, 2, "there is no output 2: the model returned a tuple of 2"),
        (Pair, "logits", "there is no output 'logits'"),
        (Named, None, "a dictionary with 'hidden', 'logits', 'counts'"),
        (Named, "logit", "there is no output 'logit': .*'logits'"),
        (Named, "counts", r"and a int64 tensor \[5\] as 'counts'"),
        (Logits, 0, r"output=0 was asked for, the model returned a float64 tensor \[5, 2\]"),
    ],
)
def test_entries_that_are_not_there(kind, output, match):
    loss = {"name": "cross_entropy", "options": {"output": output}}
    with pytest.raises(engine.EngineError, match=match) as caught:
        engine.analyze(torch.jit.script(kind().double()), X, Y, ["grad"], loss=loss)
    assert caught.value.code == "unsupported_outputs"
