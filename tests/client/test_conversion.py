"""Models in all the forms a user may hold them, and the file they become."""

import io

import pytest
import torch
from torch import nn

from curvature_client._batches import Batch
from curvature_client._conversion import convert
from curvature_client._errors import ModelConversionError, UnprocessableError

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


def converted(model, tmp_path, eval=True):
    payload, notes = convert(model, Batch((X, Y)), tmp_path, eval=eval)
    return torch.jit.load(io.BytesIO(payload.read())), notes, payload


class Unscriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = {"a": nn.Linear(3, 2)}
        self.a = self.layers["a"]

    def forward(self, x, **options):
        return self.layers["a"](x)


class Hopeless(nn.Module):
    def forward(self, x):
        yield x


def test_a_module_is_scripted(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert torch.equal(loaded(X), net(X))
    assert notes == ["the model was scripted (torch.jit.script)"]


def test_a_module_that_cannot_be_scripted_is_traced(tmp_path):
    net = Unscriptable().eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert torch.equal(loaded(X), net(X))
    assert any("traced (torch.jit.trace), as it could not be scripted" in note for note in notes)


def test_a_module_in_training_mode_stays_so_and_its_copy_does_not(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    loaded, notes, _ = converted(net, tmp_path)
    assert net.training
    assert net[1].training
    assert not loaded.training
    assert any("eval-mode copy" in note for note in notes)
    kept, _, _ = converted(net, tmp_path, eval=False)
    assert kept.training


def test_tracing_leaves_the_random_state_alone(tmp_path):
    net = Unscriptable().train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    converted(net, tmp_path, eval=False)
    assert torch.equal(torch.rand(1), expected)


def test_equal_scripts_have_equal_hashes(tmp_path):
    script = torch.jit.script(nn.Linear(3, 2))
    assert converted(script, tmp_path)[2].sha256 == converted(script, tmp_path)[2].sha256


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(tmp_path, wrap):
    net = nn.Linear(3, 2).eval()
    loaded, notes, _ = converted(wrap(net), tmp_path)
    assert {name for name, _ in loaded.named_parameters()} == {"weight", "bias"}
    assert "was analyzed; parameters are named as there" in notes[0]


def test_parametrizations_are_traced(tmp_path):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))).eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert torch.allclose(loaded(X), net(X))
    assert "0 has parametrizations" in notes[0]


def test_a_path_goes_as_it_is(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"any bytes")
    payload, notes = convert(tmp_path / "model.pt", Batch((X, Y)), tmp_path, eval=True)
    assert payload.read() == b"any bytes"
    assert notes == []


def test_what_can_neither_be_scripted_nor_traced(tmp_path):
    with pytest.raises(ModelConversionError, match=r"Hopeless could be neither scripted \(.*\) nor traced \(.*\)"):
        converted(Hopeless(), tmp_path)


@pytest.mark.parametrize(
    ("model", "message"), [(3, "got int"), (nn.Linear, "the class Linear"), (torch.relu, "the function 'relu'")]
)
def test_anything_else_is_no_model(tmp_path, model, message):
    with pytest.raises(UnprocessableError, match=message):
        converted(model, tmp_path)
