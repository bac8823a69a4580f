"""A loss function of one's own, and another batch to hold gradients against, over the wire."""

import httpx
import pytest
import safetensors.torch
import torch
from tests.integration.cases import small
from tests.integration.test_command_line import run  # noqa: F401 (a fixture)
from torch import nn

import curvature_engine as engine
from curvature_client import BatchDot, JobFailed, UnprocessableError


def tempered(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs / 2.0, targets, reduction="none")


def concave(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -outputs.square().sum(1)


def centred(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - outputs.mean(0)).square().sum(1)


def seeded(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return outputs.square().sum(1)


EXTENSIONS = ["batch_grad", "diag_ggn_exact", "kfac"]


@pytest.mark.parametrize("form", ["function", "scripted", "path", "mapping"])
def test_a_loss_function_in_every_form(client, one_thread, tmp_path, form):
    model, batch = small()
    scripted = torch.jit.script(tempered)
    scripted.save(str(tmp_path / "tempered.pt"))
    given = {
        "function": tempered,
        "scripted": scripted,
        "path": str(tmp_path / "tempered.pt"),
        "mapping": {"function": tmp_path / "tempered.pt"},
    }
    expected = engine.analyze(model, *batch, EXTENSIONS, loss=scripted)
    result = client.analyze(model, batch, EXTENSIONS, loss=given[form])
    assert result.manifest.loss_name == "custom"
    assert result.loss == float(expected.loss)
    for label in ("batch_grad", "diag_ggn_exact"):
        for parameter, value in expected[label].items():
            assert torch.equal(result[label][parameter], value)
    assert torch.equal(result["kfac"]["0.weight"].B, expected["kfac"]["0.weight"].B)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x) -> dict[str, torch.Tensor]:
        return {"logits": self.head(x)}


def test_it_may_take_an_entry_of_the_models_output(client):
    _, batch = small()
    loss = {"function": tempered, "options": {"output": "logits"}}
    result = client.analyze(Named().eval(), batch, ["grad"], loss=loss)
    assert (result.manifest.loss_name, result.manifest.loss_output) == ("custom", "logits")


@pytest.mark.parametrize(
    ("loss", "code", "reason"),
    [
        (concave, "unsupported_loss", "not convex"),
        (centred, "coupled_samples", "the loss function couples samples"),
        (seeded, "unsupported_operator", "in the loss function"),
    ],
)
def test_what_a_function_cannot_give_is_refused_by_name(client, loss, code, reason):
    model, batch = small()
    with pytest.raises(JobFailed, match=reason) as caught:
        client.analyze(model, batch, ["diag_ggn_exact"], loss=loss)
    assert (caught.value.code, caught.value.param) == (code, "loss")
    assert isinstance(caught.value, UnprocessableError)


def test_a_file_that_is_no_torchscript_is_refused_by_name(client, tmp_path):
    model, batch = small()
    (tmp_path / "loss.pt").write_bytes(b"no archive")
    with pytest.raises(JobFailed, match="in the loss function: the file is no TorchScript archive") as caught:
        client.analyze(model, batch, ["grad"], loss=tmp_path / "loss.pt")
    assert (caught.value.code, caught.value.param) == ("unsupported_loss", "loss")


def test_a_model_may_be_its_own_loss_file_and_go_on_serving(client, tmp_path):
    """The same bytes, as model and as loss: taking the loss away must leave the model."""
    model, batch = small()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    for _ in range(2):
        with pytest.raises(JobFailed, match="a loss takes"):
            client.analyze(tmp_path / "model.pt", batch, ["grad"], loss=tmp_path / "model.pt")
    assert client.analyze(tmp_path / "model.pt", batch, ["grad"]).loss > 0


def test_a_hash_that_was_never_uploaded_is_not_found(client, server):
    model, batch = small()
    job = client.submit(model, batch, ["grad"])
    body = {k: job.request[k] for k in ("model", "batch")}
    dot = {"name": "batch_dot", "options": {"against": {"sha256": "e" * 64}}}
    for change, code, param in [
        ({"loss": {"sha256": "e" * 64}, "extensions": ["grad"]}, "loss_not_found", "loss"),
        ({"extensions": ["grad", dot]}, "batch_not_found", "extensions.1.options.against"),
    ]:
        reply = httpx.post(f"{server.url}/v1/jobs", json={**body, **change})
        assert (reply.status_code, reply.json()["code"], reply.json()["param"]) == (404, code, param)


def test_dot_products_with_another_batch_equal_the_engines(client, one_thread, tmp_path):
    model, batch = small()
    other = (torch.randn(4, 5), torch.tensor([2, 1, 0, 1]))
    names = dict(zip(("inputs", "targets"), other, strict=True))
    safetensors.torch.save_file(names, tmp_path / "other.safetensors")
    asked = [{"name": "batch_dot", "options": {"against": other, "scale": "sample", "subsampling": [3, 0]}}]
    expected = engine.analyze(model, *batch, asked)["batch_dot"]
    for given in (other, names, tmp_path / "other.safetensors"):
        wanted = BatchDot(against=given, scale="sample", subsampling=[3, 0])
        result = client.analyze(model, batch, ["grad", wanted])["batch_dot"]
        for parameter, value in expected.items():
            assert value.shape == (2, 4)
            assert torch.equal(result[parameter], value)
        assert result.convention.startswith("[N, N′]")
        assert set(result.options["against"]) == {"sha256"}
        # A reference to what is there needs no upload.
        again = client.analyze(model, batch, [{"name": "batch_dot", "options": {"against": result.options["against"]}}])
        assert again["batch_dot"]["0.weight"].shape == (6, 4)


def test_what_is_wrong_with_the_other_batch_names_it(client):
    model, batch = small()
    with pytest.raises(JobFailed, match="in the batch given as batch_dot's against: class indices") as caught:
        client.analyze(model, batch, [BatchDot(against=(torch.randn(2, 5), torch.tensor([7, 0])))])
    assert (caught.value.code, caught.value.param) == ("invalid_targets", "batch_dot.against")
    with pytest.raises(UnprocessableError, match="a batch is") as caught:
        client.analyze(model, batch, [BatchDot(against=torch.randn(2, 5))])
    assert caught.value.param == "extensions.0.options.against"


def test_the_command_takes_both(run, tmp_path):  # noqa: F811
    torch.jit.script(tempered).save(str(tmp_path / "tempered.pt"))
    words = ["analyze", "model.pt", "batch.safetensors", "-e", "batch_dot", "-e", "grad", "-o", "out.safetensors"]
    done = run(*words, "--loss", "tempered.pt", "--against", "batch.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "(custom, mean)" in done.stdout
    assert safetensors.torch.load_file(tmp_path / "out.safetensors")["batch_dot/0.weight"].shape == (6, 6)
