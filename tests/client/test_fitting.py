"""A model's file that takes every batch of a data set, whatever their sizes."""

import io

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_client import ModelConversionError
from curvature_client._batches import Batch
from curvature_client._fitting import FittedModel


class Lonely(nn.Module):
    """Treats one sample differently."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(2.0 * x[:, 0]) if x.shape[0] == 1 else self.l(x[:, 0])


class Recurrent(nn.Module):
    """A layer that treats one sample differently."""

    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x):
        return self.l(x)[0][:, -1]


class Mean(nn.Module):
    """Takes sequences of any length."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x).mean(1)


class Baked(nn.Module):
    """Its trace takes as many samples as it was made with."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x, **options):
        return self.l(x).reshape(int(x.shape[0]), -1) + torch.zeros(len(list(x)), 1)


def batch(samples, *axes):
    return Batch((torch.randn(samples, *axes), torch.zeros(samples, dtype=torch.long)))


def fitted(net, batches, tmp_path, format="auto"):
    """Show the batches; returns the way taken, after the engine has taken each of them."""
    model = FittedModel(net.eval(), tmp_path, eval=True, format=format)
    for each in batches:
        model.take(each)
    path = tmp_path / "sent"
    path.write_bytes(model.converted.payload.read())
    program = engine.load(path)
    for each in batches:
        (x,) = each.example_inputs()
        found = engine.analyze(program, x, torch.zeros(len(x), dtype=torch.long), ["outputs"])["outputs"]
        torch.testing.assert_close(found, net(x).detach())
    return model.converted.way


@pytest.mark.parametrize("sizes", [(4, 4, 3), (4, 4, 1), (1, 4), (1, 1), (2, 5, 1, 3), (4,)], ids=str)
def test_parts_of_all_sizes_are_taken(tmp_path, sizes):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert fitted(net, [batch(n, 3) for n in sizes], tmp_path) == "export"


@pytest.mark.parametrize("sizes", [(4, 3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("net", [Lonely(), Recurrent()], ids=["branch", "lstm"])
def test_a_module_that_treats_one_sample_differently_is_scripted_where_a_part_has_one(tmp_path, net, sizes):
    assert fitted(net, [batch(4, 4, 3), batch(3, 4, 3)], tmp_path) == "export"
    assert fitted(net, [batch(n, 4, 3) for n in sizes], tmp_path) == "script"
    with pytest.raises(ModelConversionError, match=r"one sample differently .* drop_last=True"):
        fitted(net, [batch(n, 4, 3) for n in sizes], tmp_path, format="export")


def test_sequences_of_other_lengths_are_taken_where_the_model_does(tmp_path):
    assert fitted(Mean(), [batch(4, 5, 3), batch(4, 7, 3), batch(1, 6, 3)], tmp_path) == "script"
    with pytest.raises(ModelConversionError, match="parts of one shape"):
        fitted(Mean(), [batch(4, 5, 3), batch(4, 7, 3)], tmp_path, format="export")


def test_a_trace_that_fixed_the_number_of_samples_is_not_taken_for_others(tmp_path):
    assert fitted(Baked(), [batch(4, 3), batch(4, 3)], tmp_path, format="trace") == "trace"
    with pytest.raises(ModelConversionError, match="not be traced"):
        fitted(Baked(), [batch(4, 3), batch(4, 3), batch(2, 3)], tmp_path, format="trace")
    assert fitted(nn.Linear(3, 2), [batch(4, 3), batch(2, 3)], tmp_path, format="trace") == "trace"


def test_the_file_of_a_data_set_is_that_of_a_batch(tmp_path):
    net, hashes = nn.Linear(3, 2), []
    for batches in ([batch(4, 3)], [batch(5, 3), batch(5, 3), batch(2, 3)]):
        model = FittedModel(net, tmp_path, eval=True, format="auto")
        for each in batches:
            model.take(each)
        hashes.append(model.converted.payload.sha256)
        assert torch.export.load(io.BytesIO(model.converted.payload.read()))
    assert hashes[0] == hashes[1]


def test_a_model_file_goes_as_it_is(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"a model")
    model = FittedModel(tmp_path / "model.pt", tmp_path, eval=True, format="auto")
    for each in (batch(4, 3), batch(1, 3), batch(4, 5)):
        model.take(each)
    assert (model.converted.payload.read(), model.converted.way) == (b"a model", None)
