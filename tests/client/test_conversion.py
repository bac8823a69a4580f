"""Models in all the forms a user may hold them, and the file they become."""

import io
import zipfile

import pytest
import torch
from torch import nn

from curvature_client._batches import Batch
from curvature_client._conversion import convert
from curvature_client._errors import ModelConversionError, UnprocessableError

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


def converted(model, tmp_path, eval=True, format="auto", batch=(X, Y)):
    payload, notes = convert(model, Batch(batch), tmp_path, eval=eval, format=format)
    data = io.BytesIO(payload.read())
    with zipfile.ZipFile(data) as archive:
        is_export = any(name.endswith("models/model.json") for name in archive.namelist())
    data.seek(0)
    loaded = torch.export.load(data).module() if is_export else torch.jit.load(data)
    loaded.format = "export" if is_export else "torchscript"
    return loaded, notes, payload


class Hopeless(nn.Module):
    def forward(self, x):
        yield x


class Branching(nn.Module):
    """Decides by its data: no export."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x) if bool(x.sum() > 0) else self.l(-x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class StraightThrough(nn.Module):
    """A custom backward, which torch.export drops."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return Straight.apply(self.l(x))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x) + torch.randn(2)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x):
        self.runs.add_(1.0)
        return self.l(x) * self.runs


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x, scale, offset=None):
        return self.l(x) * scale + (0.0 if offset is None else offset)


def test_a_module_is_exported_for_any_number_of_samples(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert loaded.format == "export"
    for rows in (X, X[:1], torch.cat([X, X])):
        assert torch.equal(loaded(rows), net(rows))
    assert notes == []


class Lonely(nn.Module):
    """Treats one sample differently."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(2.0 * x) if x.shape[0] == 1 else self.l(x)


class Recurrent(nn.Module):
    """A layer that treats one sample differently."""

    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x):
        return self.l(x)[0][:, -1]


def test_one_sample_is_exported_for(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    loaded, notes, payload = converted(net, tmp_path, batch=(X[:1], Y[:1]))
    assert loaded.format == "export"
    (bounds,) = torch.export.load(io.BytesIO(payload.read())).range_constraints.values()
    assert bounds.lower <= 1
    assert notes == []
    for rows in (X, X[:1]):
        assert torch.equal(loaded(rows), net(rows))


@pytest.mark.parametrize("net", [Lonely(), Recurrent()], ids=["branch", "lstm"])
def test_a_module_that_treats_one_sample_differently_is_exported_for_one_alone(tmp_path, net):
    loaded, _, payload = converted(net.eval(), tmp_path, batch=(X[:1, None].expand(1, 4, 3), Y[:1]))
    assert loaded.format == "export"
    assert not torch.export.load(io.BytesIO(payload.read())).range_constraints
    one = torch.randn(1, 4, 3)
    assert torch.equal(loaded(one), net(one))


@pytest.mark.parametrize("samples", [2, 4])
def test_an_export_is_the_same_file_whatever_the_batch(tmp_path, samples):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    _, _, expected = converted(net, tmp_path)
    loaded, _, payload = converted(net, tmp_path, batch=(torch.randn(samples, 3), Y[:samples]))
    assert loaded.format == "export"
    assert payload.sha256 == expected.sha256


def test_inputs_by_name_and_inputs_that_all_samples_share(tmp_path):
    net, scale = Two().eval(), torch.rand(2)
    for inputs in ({"x": X, "scale": scale}, (X, scale)):
        loaded, notes, _ = converted(net, tmp_path, batch={"inputs": inputs, "targets": Y})
        assert loaded.format == "export"
        assert notes == []
        given = {"x": X[:3], "scale": scale}
        found = loaded(**given) if isinstance(inputs, dict) else loaded(*given.values())
        assert torch.equal(found, net(**given))


def test_a_module_that_cannot_be_exported_is_scripted(tmp_path):
    net = Branching().eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert loaded.format == "torchscript"
    assert torch.equal(loaded(-X.abs()), net(-X.abs()))
    assert notes == []


def test_an_export_with_other_gradients_is_not_taken(tmp_path):
    with pytest.raises(ModelConversionError, match=r"gradient of l.weight is not the module's"):
        converted(StraightThrough(), tmp_path, format="export")
    with pytest.raises(ModelConversionError):
        converted(StraightThrough(), tmp_path)


def test_an_export_with_other_outputs_is_not_taken(tmp_path):
    with pytest.raises(ModelConversionError, match="outputs are not the module's"):
        converted(Drawing(), tmp_path, format="export")


def test_buffers_that_forward_edits_are_sent_as_they_were(tmp_path):
    net = Counting().eval()
    loaded, _, _ = converted(net, tmp_path)
    assert loaded.format == "export"
    assert float(loaded.runs) == float(net.runs) == 0


@pytest.mark.parametrize(
    ("format", "kind"), [("export", "export"), ("script", "torchscript"), ("trace", "torchscript")]
)
def test_one_way_may_be_asked_for(tmp_path, format, kind):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    loaded, notes, _ = converted(net, tmp_path, format=format)
    assert loaded.format == ("export" if format == "export" else "torchscript")
    assert any("was traced" in note for note in notes) == (format == "trace")


@pytest.mark.parametrize(("format", "what"), [("script", "goes as it is"), ("onnx", "one of auto, export")])
def test_a_format_that_says_nothing_is_refused(tmp_path, format, what):
    with pytest.raises(UnprocessableError, match=what):
        converted(torch.jit.script(nn.Linear(3, 2)), tmp_path, format=format)


def test_an_exported_program_is_saved(tmp_path):
    program = torch.export.export(nn.Linear(3, 2), (X,))
    loaded, notes, _ = converted(program, tmp_path)
    assert torch.equal(loaded(X), program.module()(X))
    assert notes == []


def test_a_module_that_cannot_be_scripted_either_is_traced(tmp_path):
    class Both(Branching):
        def forward(self, x, **options):
            return super().forward(x)

    net = Both().eval()
    loaded, notes, _ = converted(net, tmp_path)
    assert torch.equal(loaded(X), net(X))
    assert any("traced (torch.jit.trace)" in note and "could not be scripted" in note for note in notes)


def test_a_module_in_training_mode_stays_so_and_its_copy_does_not(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    loaded, notes, _ = converted(net, tmp_path)
    assert net.training
    assert net[1].training
    assert torch.equal(loaded(X), loaded(X))
    assert any("eval-mode copy" in note for note in notes)
    kept, _, _ = converted(net, tmp_path, eval=False)
    assert kept.training
    assert kept.format == "torchscript"


@pytest.mark.parametrize("format", ["export", "trace"])
def test_conversion_leaves_the_random_state_alone(tmp_path, format):
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    converted(net, tmp_path, eval=format == "export", format=format)
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


@pytest.mark.parametrize("format", ["auto", "trace"])
def test_parametrizations_are_exported_or_traced(tmp_path, format):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))).eval()
    loaded, _, _ = converted(net, tmp_path, format=format)
    assert torch.allclose(loaded(X), net(X))
    with pytest.raises(ModelConversionError, match="0 has parametrizations"):
        converted(net, tmp_path, format="script")


def test_a_path_goes_as_it_is(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"any bytes")
    payload, notes = convert(tmp_path / "model.pt", Batch((X, Y)), tmp_path, eval=True)
    assert payload.read() == b"any bytes"
    assert notes == []


def test_what_can_be_converted_in_no_way(tmp_path):
    ways = r"Hopeless could be neither exported \(.*\) nor scripted \(.*\) nor traced \(.*\)"
    with pytest.raises(ModelConversionError, match=ways):
        converted(Hopeless(), tmp_path)


@pytest.mark.parametrize(
    ("model", "message"), [(3, "got int"), (nn.Linear, "the class Linear"), (torch.relu, "the function 'relu'")]
)
def test_anything_else_is_no_model(tmp_path, model, message):
    with pytest.raises(UnprocessableError, match=message):
        converted(model, tmp_path)
