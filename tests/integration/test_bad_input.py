"""Bad input: a clear error of the right class, with code, param and remedy; nothing lost, no worker harmed."""

import io
import zipfile

import httpx
import pytest
import torch
from tests.integration.cases import small
from torch import nn

from curvature_client import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    Client,
    CurvatureError,
    JobFailed,
    ModelConversionError,
    NotFoundError,
    PayloadTooLargeError,
    UnprocessableError,
)

MODEL, (X, Y) = small()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 3)

    def forward(self, x):
        return self.l(x + torch.rand_like(x))


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0))


class Callback(nn.Module):
    """Neither scriptable nor traceable."""

    def forward(self, x):
        yield x


def saved(module):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def training_trace():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    return torch.jit.trace(net, X, check_trace=False)


# (what is wrong, arguments that replace the good ones, code, what the message says)
IN_THE_WORKER = [
    ("shape", {"batch": (torch.randn(6, 7), Y)}, "invalid_inputs", "aten::linear"),
    ("dtype", {"batch": (X.double(), Y)}, "invalid_inputs", "dtype"),
    ("too many inputs", {"batch": {"inputs": (X, X), "targets": Y}}, "invalid_inputs", "takes 1 inputs"),
    ("unknown input", {"batch": {"inputs": {"z": X}, "targets": Y}}, "invalid_inputs", "no input named 'z'"),
    ("range", {"batch": (X, Y + 3)}, "invalid_targets", "class indices must lie in 0 … 2"),
    ("number of targets", {"batch": (X, Y[:5])}, "invalid_targets", "6 samples"),
    ("type of targets", {"batch": (X, Y.float()), "loss": "cross_entropy"}, "invalid_targets", "float32"),
    ("shape of targets", {"batch": (X, torch.randn(6, 2)), "loss": "mse"}, "invalid_targets", r"\[6, 3\]"),
    ("no default loss", {"batch": (X, torch.randn(6, 3))}, "loss_required", "say loss="),
    ("training mode", {"model": training_trace()}, "training_mode", "batch normalisation runs in training mode"),
    ("frozen", {"model": torch.jit.freeze(torch.jit.script(MODEL))}, "no_parameters", "frozen"),
    ("operator", {"model": Noisy().eval()}, "unsupported_operator", r"self\.l\(x \+ torch\.rand_like\(x\)\)"),
    ("coupled samples", {"model": Coupled().eval()}, "coupled_samples", "samples are coupled"),
]


@pytest.mark.parametrize(
    ("changed", "code", "message"), [c[1:] for c in IN_THE_WORKER], ids=[c[0] for c in IN_THE_WORKER]
)
def test_what_only_the_worker_can_see_fails_the_job(client, changed, code, message):
    arguments = {"model": MODEL, "batch": (X, Y), "extensions": ["variance"], **changed}
    with pytest.raises(JobFailed, match=message) as caught:
        client.analyze(**arguments)
    error = caught.value
    assert isinstance(error, UnprocessableError)
    assert error.code == code
    assert error.param
    assert error.remedy
    job = client.jobs.get(error.job_id)
    assert job.status == "failed"
    assert job.error.code == code
    assert str(job.error) == str(error)


FILES = [
    ("text", b"hello, I am no model", "no TorchScript archive"),
    ("empty file", b"", "the file is empty"),
    ("truncated", saved(torch.jit.script(MODEL))[:-100], "truncated"),
    ("half", saved(torch.jit.script(MODEL))[:2000], "truncated"),
]


@pytest.mark.parametrize(("data", "message"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_files_that_are_no_models(client, tmp_path, data, message):
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(UnprocessableError, match=message) as caught:
        client.analyze(tmp_path / "model.pt", (X, Y), ["grad"])
    assert caught.value.code == "invalid_model"
    assert caught.value.remedy


def test_a_checkpoint_is_no_model(client, tmp_path):
    torch.save(MODEL.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UnprocessableError, match=r"checkpoint made by torch\.save"):
        client.analyze(tmp_path / "model.pt", (X, Y), ["grad"])


def test_a_zip_of_something_else_is_no_model(client, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UnprocessableError, match="no TorchScript file") as caught:
        client.analyze(tmp_path / "model.pt", (X, Y), ["grad"])
    assert caught.value.code == "invalid_model"


def test_a_batch_file_that_is_no_safetensors(client, tmp_path):
    (tmp_path / "batch.safetensors").write_bytes(b"hello")
    script = torch.jit.script(MODEL)
    with pytest.raises(UnprocessableError, match="no safetensors file") as caught:
        client.analyze(script, tmp_path / "batch.safetensors", ["grad"])
    assert caught.value.code == "invalid_batch"


def test_an_upload_of_the_wrong_hash_leaves_nothing(server, client):
    url = f"{server.url}/v1/models/{'0' * 64}"
    reply = httpx.put(url, content=b"something else")
    assert reply.status_code == 400
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["code"] == "hash_mismatch"
    assert httpx.get(url).json()["code"] == "model_not_found"
    with pytest.raises(BadRequestError, match="have the SHA-256"):
        client._transport.request("PUT", f"/v1/models/{'0' * 64}", content=b"something else")


AT_THE_DOOR = [
    ({"extensions": ["batch_gard"]}, "unknown_extension", "did you mean 'batch_grad'.*known extensions: .*kflr"),
    ({"extensions": ["DiagGGNExact"]}, "unknown_extension", "did you mean 'diag_ggn_exact'"),
    ({"extensions": [{"name": "kfac", "options": {"samples": 2}}]}, "invalid_option", "mc_samples"),
    ({"extensions": [{"name": "kfac", "options": {"mc_samples": 0}}]}, "invalid_option", "mc_samples"),
    ({"loss": "hinge"}, "unknown_loss", "known losses: cross_entropy, mse"),
    ({"loss": {"name": "mse", "options": {"weight": 1}}}, "invalid_option", "mse has no option 'weight'"),
    ({"loss": {"name": "cross_entropy", "options": {"ignore_index": "x"}}}, "invalid_option", "ignore_index"),
    ({"reduction": "none"}, "invalid_option", "mean"),
    ({"parameters": []}, "invalid_request", "parameters"),
    ({"seed": -1}, "invalid_request", "seed"),
    ({"priority": 11}, "invalid_request", "priority"),
    ({"metadata": {"a": 1}}, "invalid_request", "metadata"),
    ({"batch": (X[:0], Y[:0])}, "empty_batch", "no samples"),
    ({"batch": X}, "invalid_batch", "a batch is"),
    ({"batch": (X, "labels")}, "invalid_targets", "targets must be"),
    ({"model": 3}, "invalid_model", "a model is"),
    ({"model": nn.Linear}, "invalid_model", "make an instance"),
    ({"model": "/no/such/file.pt"}, "invalid_model", "does not exist"),
]


@pytest.mark.parametrize(("changed", "code", "message"), AT_THE_DOOR, ids=[str(c[1]) for c in AT_THE_DOOR])
def test_what_can_be_seen_at_once_makes_no_job(client, changed, code, message):
    before = len(client.jobs.list(limit=1))
    newest = client.jobs.list(limit=1)[0].id if before else None
    with pytest.raises(UnprocessableError, match=message) as caught:
        client.analyze(**{"model": MODEL, "batch": (X, Y), "extensions": ["variance"], **changed})
    assert caught.value.code == code
    assert not isinstance(caught.value, JobFailed)
    jobs = client.jobs.list(limit=1)
    assert (jobs[0].id if jobs else None) == newest


def test_a_module_that_cannot_be_converted(client):
    with pytest.raises(ModelConversionError, match=r"neither exported .* nor scripted .* nor traced") as caught:
        client.analyze(Callback(), (X, Y), ["grad"])
    assert caught.value.remedy


def test_nan_in_the_loss_is_delivered_with_a_warning(client):
    x = X.clone()
    x[0, 0] = float("nan")
    result = client.analyze(MODEL, (x, Y), ["batch_grad"])
    assert any("the loss is nan" in warning for warning in result.warnings)
    assert result.loss != result.loss
    assert torch.isnan(result["batch_grad"]["0.weight"][0]).any()
    assert torch.isfinite(result["batch_grad"]["0.weight"][1:]).all()


def test_a_label_that_is_not_in_the_result(client):
    job = client.submit(MODEL, (X, Y), ["grad"]).wait()
    with pytest.raises(NotFoundError, match="its labels: grad") as caught:
        client._transport.request("GET", f"/v1/jobs/{job.id}/result/kfac.safetensors")
    assert caught.value.code == "result_not_found"
    with pytest.raises(KeyError, match="there are grad"):
        job.result()["kfac"]


def test_too_large_an_upload(tmp_path, monkeypatch):
    from tests.integration.serving import Server

    monkeypatch.setenv("CURVATURE_MAX_UPLOAD_BYTES", "100000")
    server = Server(tmp_path / "data")
    with Client(server.url) as client, pytest.raises(PayloadTooLargeError, match="uploads may have 100000 bytes"):
        client.analyze(nn.Linear(500, 100).eval(), (torch.randn(2, 500), torch.zeros(2).long()), ["grad"])
    assert server.stop() == 0


def test_a_server_that_is_not_there():
    with Client("http://127.0.0.1:9", max_retries=0) as client, pytest.raises(APIConnectionError) as caught:
        client.analyze(MODEL, (X, Y), ["grad"])
    assert "curvature serve" in caught.value.remedy
    assert caught.value.code == "server_absent"


def test_something_else_answers_at_the_address():
    with pytest.raises(CurvatureError, match="address must be like"):
        Client("localhost:8000")


def test_errors_carry_the_request_id(client):
    with pytest.raises(APIStatusError) as caught:
        client.jobs.get("none")
    assert caught.value.request_id


def test_after_all_that_the_worker_is_the_one_that_started(client):
    health = client.health()
    assert len(health.workers) == 1
    assert client.analyze(MODEL, (X, Y), ["grad"]).loss > 0
