"""A warm analysis makes the host wait for the device where it must, and nowhere else."""

import pytest
import torch
from tests.engine.host_reads import HostReads
from torch import nn

import curvature_engine as engine
from curvature_engine.rules import embedding

TARGETS = "losses/classes.py:_read_indices (_local_scalar_dense)"
"""Whether every class exists: before anything is sent back."""
ENDS = {"analysis.py:_analysis (_local_scalar_dense)", "precision.py:all_finite (_local_scalar_dense)"}
"""Whether loss and outputs are finite: when everything else was asked of the device."""
OF_EXTENSION = {
    # On the CPU alone: on CUDA the spread is always made of what is centred first.
    "variance": {"rules/linear.py:_uncentred (_local_scalar_dense)"},
    "gradient_noise_scale": {"rules/linear.py:_uncentred (_local_scalar_dense)"},
}
NAMES = [entry["name"] for entry in engine.catalogue()["extensions"] if entry["name"] != "kfra"]
"""`kfra` asks every operator on the way what kind it is."""


def pool():
    return nn.Sequential(nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))


def three_convolutions():
    convolutions = nn.Conv2d(3, 8, 5), pool(), nn.Conv2d(8, 8, 3), pool(), nn.Conv2d(8, 8, 3, padding=1), pool()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 10)).eval()


class Language(nn.Module):
    """Embeddings of words and places, attention, normalisation, a tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.normal, self.project, self.after = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x) + self.places(torch.arange(x.size(1), device=x.device).expand_as(x))
        q, k, v = self.project(self.normal(x)).chunk(3, -1)
        x = x + self.after(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return nn.functional.linear(nn.functional.gelu(x), self.words.weight).transpose(1, 2)


def reads(program, inputs, targets, request, loss=None):
    engine.analyze(program, inputs, targets, [request], loss=loss)
    with HostReads() as found:
        result = engine.analyze(program, inputs, targets, [request], loss=loss)
    entries = [entry for group in result.groups.values() for entry in group.provenance.values()]
    assert {entry["method"] for entry in entries} <= {"closed form", "autograd"}
    return dict(found)


@pytest.mark.parametrize("name", NAMES)
def test_three_convolutions(name):
    torch.manual_seed(0)
    program = engine.load(torch.jit.script(three_convolutions()))
    found = reads(program, torch.randn(4, 3, 32, 32), torch.tensor([0, 9, 3, 3]), name)
    assert found.pop(TARGETS) == 1
    for place in ENDS:
        assert found.pop(place, 0) <= 1
    assert set(found) <= OF_EXTENSION.get(name, set())


@pytest.mark.parametrize(
    "name", ["batch_l2", "sum_grad_squared", "variance", "diag_ggn_mc", "kfac", "kflr", "batch_grad"]
)
def test_a_language_model(name, monkeypatch):
    monkeypatch.setattr(embedding, "_with_places", embedding._with_places_unread)  # as on a GPU
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (3, 6))
    program = engine.load(torch.jit.script(Language().eval()))
    found = reads(program, tokens, tokens.roll(1, 1), name, "cross_entropy")
    assert found.pop(TARGETS) == 1
    assert set(found) <= ENDS


@pytest.mark.parametrize("name", ["batch_l2", "diag_ggn_exact", "kfac"])
def test_squared_error_needs_to_know_nothing_of_its_targets(name):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    program = engine.load(torch.jit.script(nn.Sequential(*layers).eval()))
    assert set(reads(program, torch.randn(4, 2, 6, 6), torch.randn(4, 2), name, "mse")) <= ENDS


def test_what_reads_is_seen():
    with HostReads() as found:
        t = torch.arange(4)
        bool((t > 2).any()), t.tolist(), t[t > 2], torch.tensor([1]), torch.equal(t, t), t.nonzero()
    assert sum(found.values()) == 6
