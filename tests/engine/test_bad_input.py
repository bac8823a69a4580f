"""Bad input is refused with a code, what was expected, and what to do; never with a wrong number."""

import io

import pytest
import torch
from torch import nn

import curvature_engine as engine

NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
X, Y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])


def analyze(module=NET, x=X, y=Y, extensions=("variance",), **options):
    if isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule):
        module = torch.jit.script(module.eval())
    return engine.analyze(module, x, y, list(extensions), **options)


def refused(code, *arguments, match=None, **options):
    with pytest.raises(engine.EngineError, match=match) as caught:
        analyze(*arguments, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def test_a_text_file_is_no_model(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("hello")
    assert "torch.jit.save" in str(refused("invalid_model", path, match="no TorchScript file"))


def test_a_missing_file(tmp_path):
    refused("invalid_model", tmp_path / "absent.pt", match="no file")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file(tmp_path, share):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(NET), buffer)
    path = tmp_path / "model.pt"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    refused("invalid_model", path)


def test_a_frozen_module_has_no_parameters():
    refused("no_parameters", torch.jit.freeze(torch.jit.script(NET.eval())), match="frozen")


def test_nothing_trainable():
    net = nn.Linear(3, 2).requires_grad_(False)
    refused("no_parameters", net, match="requires a gradient")
    assert set(analyze(net, parameters="all")["variance"]) == {"weight", "bias"}


@pytest.mark.parametrize(("layer", "name"), [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(4), "batch normalisation")])
def test_training_mode_baked_into_a_trace(layer, name):
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)).train()
    traced = torch.jit.trace(net, X, check_trace=False)
    error = refused("training_mode", traced, match=name)
    assert ".eval()" in error.remedy


def test_batch_norm_in_training_mode_is_refused_and_dropout_kept_when_asked():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    with pytest.raises(engine.EngineError, match="training mode"):
        engine.analyze(torch.jit.script(net), X, Y, ["variance"], eval=False)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    script = torch.jit.script(net)
    first = engine.analyze(script, X, Y, ["outputs"], eval=False, seed=3)
    second = engine.analyze(script, X, Y, ["outputs"], eval=False, seed=3)
    assert any("dropout was active" in w for w in first.warnings)
    assert torch.equal(first["outputs"], second["outputs"])
    assert not torch.equal(first["outputs"], engine.analyze(script, X, Y, ["outputs"])["outputs"])


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.randn(5, 4), "linear"),
        (torch.randn(5, 3).double(), "dtype"),
        ((X, X), "takes 1 inputs"),
        ({"y": X}, "no input named 'y'"),
        ({}, "no inputs"),
    ],
)
def test_inputs_that_the_model_rejects(x, match):
    refused("invalid_inputs", NET, x, match=match)


@pytest.mark.parametrize(
    ("y", "options", "match"),
    [
        (torch.tensor([0, 1, 2, 0, 0]), {}, "0 … 1"),
        (torch.tensor([0, -1, 1, 0, 0]), {}, "0 … 1"),
        (Y.float(), {"loss": "cross_entropy"}, "float32"),
        (Y[:4], {}, "5 samples"),
        (torch.zeros(5, 2, dtype=torch.long), {"loss": "cross_entropy"}, r"expects targets \[5\]"),
        (torch.randn(5, 3), {"loss": "mse"}, r"\[5, 2\]"),
    ],
)
def test_targets_that_do_not_fit(y, options, match):
    refused("invalid_targets", NET, X, y, match=match, **options)


def test_no_default_loss_for_real_targets():
    refused("loss_required", NET, X, torch.randn(5, 2), match="say loss=")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16])
def test_any_integer_type_holds_class_indices(dtype):
    expected = analyze(extensions=["batch_grad"])["batch_grad"]["0.weight"]
    actual = analyze(y=Y.to(dtype), loss="cross_entropy", extensions=["batch_grad"])["batch_grad"]["0.weight"]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("x", [X.to_sparse(), X.to("meta")], ids=["sparse", "meta"])
def test_only_dense_tensors(x):
    refused("invalid_inputs", NET, x, match="dense")


@pytest.mark.parametrize("y", [[0, 1, 0, 1, 1], None])
def test_targets_are_one_tensor(y):
    refused("invalid_targets", NET, X, y, match=type(y).__name__)


def test_an_empty_batch():
    refused("empty_batch", NET, X[:0], Y[:0])


def test_nan_is_delivered_with_a_warning():
    x = X.clone()
    x[0] = float("nan")
    result = analyze(NET, x, extensions=["batch_grad", "diag_ggn_exact"])
    assert any("nan" in w for w in result.warnings)
    assert torch.isnan(result["batch_grad"]["0.weight"][0]).all()
    assert torch.isfinite(result["batch_grad"]["0.weight"][1:]).all()


@pytest.mark.parametrize(
    ("extension", "code", "match"),
    [
        ("batch_gard", "unknown_extension", "known extensions: .*batch_grad"),
        ({"name": "kfac", "options": {"samples": 2}}, "invalid_option", "mc_samples"),
        ({"name": "kfac", "options": {"mc_samples": 0}}, "invalid_option", "from 1"),
        ({"name": "kfac", "options": {"approximation": "exact"}}, "invalid_option", "'expand'"),
        ({"name": "grad", "options": {"x": 1}}, "invalid_option", "none"),
    ],
)
def test_unknown_extensions_and_options(extension, code, match):
    refused(code, extensions=[extension], match=match)


@pytest.mark.parametrize(
    ("code", "options", "match"),
    [
        ("invalid_option", {"seed": 2**63}, "whole number"),
        ("invalid_option", {"seed": "seven"}, "'seven'"),
        ("invalid_option", {"budget_bytes": "much"}, "'much'"),
        ("invalid_option", {"budget_bytes": 0}, "from 1"),
        ("invalid_option", {"device": "abacus"}, "abacus"),
        ("invalid_option", {"device": "meta"}, "meta"),
        ("invalid_option", {"loss": {"name": "mse", "options": 3}}, "mapping"),
    ],
)
def test_options_of_the_wrong_kind(code, options, match):
    refused(code, match=match, **options)


def test_extensions_of_the_wrong_kind():
    with pytest.raises(engine.EngineError, match="list of names"):
        engine.analyze(NET, X, Y, None)
    refused("invalid_option", extensions=[{"name": "kfac", "options": 3}], match="mapping")
    assert set(engine.analyze(NET, X, Y, {"name": "kfac"}).groups) == {"kfac"}


def test_labels_must_differ():
    refused("invalid_request", extensions=["kfac", {"name": "kfac", "options": {"mc_samples": 2}}], match="kfac")


@pytest.mark.parametrize("loss", ["cross-entropy", {"name": "hinge"}, 3])
def test_unknown_losses(loss):
    refused("unknown_loss", loss=loss, match="cross_entropy")


def test_loss_modules_bring_their_reduction():
    by_module = analyze(loss=nn.CrossEntropyLoss(reduction="sum"))
    assert by_module.info["reduction"] == "sum"
    refused("invalid_option", loss=nn.CrossEntropyLoss(), reduction="sum", match="reduction")
    refused("unknown_loss", loss=nn.BCELoss(), match="BCEWithLogitsLoss")
    refused("unknown_loss", loss=nn.GaussianNLLLoss(), match="var")


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x + torch.rand_like(x))


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x), x


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x).detach()


def test_an_operator_off_the_list_is_named_with_its_line():
    error = refused("unsupported_operator", Noisy(), match="aten::rand_like")
    assert "return self.l(x + torch.rand_like(x))" in error.message
    assert error.param == "aten::rand_like"


@pytest.mark.parametrize("extension", ["batch_grad", "variance", "diag_ggn_exact", "kfac"])
def test_coupled_samples_are_refused(extension):
    refused("coupled_samples", Coupled(), extensions=[extension], match="aten::linear")


def test_coupled_samples_still_have_a_gradient():
    module = Coupled()
    expected = torch.autograd.grad(nn.functional.cross_entropy(module(X), Y), module.a.weight)[0]
    torch.testing.assert_close(analyze(module, extensions=["grad"])["grad"]["a.weight"], expected)


def test_outputs_must_be_one_tensor_that_depends_on_the_parameters():
    refused("unsupported_outputs", Several(), match='tuple of 2; .*"output"')
    refused("unsupported_model", Detached(), match="do not depend")


class RootOfZero(Noisy):
    def forward(self, x):
        return torch.sqrt(self.l(x) * 0.0)


def test_gradients_that_are_not_finite_are_delivered_unverified_with_a_warning():
    result = analyze(RootOfZero(), extensions=["batch_grad"])
    assert any("not finite" in w for w in result.warnings)
    assert not result.groups["batch_grad"].provenance["l.weight"]["verified"]
    assert not torch.isfinite(result["batch_grad"]["l.weight"]).all()


class AsksForAnAxis(Noisy):
    def forward(self, x):
        return self.l(x) * x.size(5)


class AsksForOneNumber(Noisy):
    def forward(self, x):
        return self.l(x) * x.item()


class DecidesOnManyNumbers(Noisy):
    def forward(self, x):
        if bool(x):
            x = x + 1
        return self.l(x)


class DividesByZero(Noisy):
    def forward(self, x):
        return self.l(x) * (1 // int(x.sum() * 0))


class TakesAbsentItem(Noisy):
    def forward(self, x):
        names = {"a": 1}
        return self.l(x) * names["b"]


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (AsksForAnAxis, "x.size.5.*tuple index out of range"),
        (AsksForOneNumber, "15 elements"),
        (DecidesOnManyNumbers, "ambiguous"),
        (DividesByZero, "division or modulo by zero"),
        (TakesAbsentItem, "b"),
    ],
)
def test_what_python_would_raise_inside_the_model_is_told_with_its_line(module, match):
    error = refused("invalid_inputs", module(), match=match)
    assert "test_bad_input.py, line" in error.message
