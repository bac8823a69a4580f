"""The main job, over real HTTP, a real broker and a real worker: what comes back is what the engine computes."""

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from tests.engine.models import CASES, build, exported, targets_for, torchscript
from tests.integration.cases import small
from torch import nn

import curvature_engine as engine
from curvature_client import KFAC, BatchDot, Client, DiagGGNMC, KroneckerFactors, Result, UnprocessableError

REQUESTS = [
    *("batch_loss", "outputs", "grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact"),
    {"name": "diag_ggn_mc", "options": {"mc_samples": 3}},
    *({"name": "kfac", "label": f"kfac_{a}", "options": {"approximation": a}} for a in ("expand", "reduce")),
    {"name": "kflr", "label": "kflr", "options": {"approximation": "backpack"}},
    {"name": "kfac", "label": "joint", "options": {"fisher": "empirical", "joint_bias": True}},
    *(
        {"name": e, "options": {"over": "model", "scale": "sample"}, "label": f"{e}_model"}
        for e in ("batch_l2", "batch_dot")
    ),
    *({"name": e, "options": {"subsampling": [2, 0, 2]}} for e in ("batch_diag_ggn_exact", "sqrt_ggn_exact")),
    *("batch_dot", "gradient_noise_scale", "saliency", "diag_hessian", "batch_diag_hessian"),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("way", ["scripted", "traced", "exported"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual_batchnorm", "tied_embedding", "lstm", "two_inputs"])
def test_tensors_equal_the_engines_bit_for_bit(client, one_thread, name, loss, way):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), loss)
    script = exported(module, inputs) if way == "exported" else torchscript(module, inputs, way)
    batch = {"inputs": inputs if len(inputs) > 1 else inputs[0], "targets": targets}
    result = client.analyze(script, batch, REQUESTS, loss=loss, reduction="sum", seed=5)
    expected = engine.analyze(script, inputs, targets, REQUESTS, loss=loss, reduction="sum", seed=5)

    assert result.manifest.format == ("export" if way == "exported" else "torchscript")
    assert result.loss == float(expected.loss)
    assert list(result) == list(expected.groups)
    for label, group in expected.groups.items():
        assert {t.name for t in result.manifest.groups[list(result).index(label)].tensors} == set(group.tensors)
        if group.kind == "tensor":
            assert torch.equal(result[label], group.tensors[label])
            continue
        assert result[label].missing == group.missing
        for parameter, value in group.items():
            pairs = zip(result[label][parameter], value, strict=True) if group.kind == "factors" else None
            for mine, theirs in pairs or [(result[label][parameter], value)]:
                assert theirs is mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.hidden(x))
        return {"hidden": h, "logits": self.head(h)}


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0, 0.7]), label_smoothing=0.1), torch.tensor([0, 1, 2, 1])),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.1, 2.0, 0.7]), reduction="sum"), torch.rand(4, 3)),
        ({"name": "gaussian_nll", "options": {"var": [0.1, 2.0, 0.7]}}, torch.rand(4, 3)),
    ],
)
def test_losses_and_their_options_reach_the_engine(client, one_thread, loss, targets):
    named, x = Named().eval(), torch.randn(4, 5)
    plain = nn.Sequential(named.hidden, nn.Tanh(), named.head).eval()
    expected = engine.analyze(plain, x, targets, ["diag_ggn_exact"], loss=loss)["diag_ggn_exact"]
    result = client.analyze(plain, (x, targets), ["diag_ggn_exact"], loss=loss)
    assert torch.equal(result["diag_ggn_exact"]["2.weight"], expected["2.weight"])
    if isinstance(loss, dict):
        loss = {"name": loss["name"], "options": {**loss["options"], "output": "logits"}}
        result = client.analyze(named, (x, targets), ["diag_ggn_exact"], loss=loss)
        torch.testing.assert_close(result["diag_ggn_exact"]["head.weight"][...], expected["2.weight"])
        assert (result.manifest.loss_options["var"], result.manifest.loss_output) == ([0.1, 2.0, 0.7], "logits")


def test_the_bare_call_needs_no_loss(client):
    model, batch = small()
    result = client.analyze(model, batch, ["diag_ggn_mc"])
    assert isinstance(result, Result)
    assert result.manifest.loss_name == "cross_entropy"
    assert result["diag_ggn_mc"]["0.weight"].shape == (4, 5)


def test_typed_values_labels_and_factors(client):
    model, batch = small()
    result = client.analyze(model, batch, ["grad", KFAC(mc_samples=4, label="kfac4"), KFAC, DiagGGNMC(mc_samples=2)])
    assert list(result) == ["grad", "kfac4", "kfac", "diag_ggn_mc"]
    pair = result["kfac4"]["0.weight"]
    assert isinstance(pair, KroneckerFactors)
    assert pair.B.shape == (4, 4)
    assert pair.A.shape == (5, 5)
    assert result["kfac4"]["0.bias"].A is None
    defaults = {"approximation": "expand", "fisher": "mc", "joint_bias": False, "strict": False}
    assert result["kfac4"].options == {**defaults, "mc_samples": 4}
    assert result["kfac4"].entry("0.weight", "A").provenance.mc_samples == 4


def test_parameters_without_factors_are_listed_with_the_reason(client):
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    group = client.analyze(net, small()[1], ["kfac"])["kfac"]
    assert set(group.missing) == {"1.weight", "1.bias"}
    assert "layer_norm" in group.missing["1.weight"]
    with pytest.raises(KeyError, match=r"no entry for 1\.weight: no Kronecker form"):
        group["1.weight"]
    with pytest.raises(KeyError, match=r"no parameter 'x'; it has 0\.weight"):
        group["x"]


def test_shared_parameters_answer_to_all_their_names(client):
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)).eval()
    net[2].weight = net[0].weight
    group = client.analyze(torch.jit.script(net), small()[1], ["variance"])["variance"]
    assert list(group) == ["0.weight", "0.bias", "2.bias", "3.weight", "3.bias"]
    assert group["2.weight"] is group["0.weight"]


# How a batch may be given


def result_of(client, model, batch, **options):
    return client.analyze(model, batch, ["grad"], **options)["grad"]


def test_every_form_of_a_batch_means_the_same(client, tmp_path):
    model, (x, y) = small()
    expected = result_of(client, model, (x, y))["0.weight"]
    safetensors.torch.save_file({"inputs": x, "targets": y}, tmp_path / "batch.safetensors")
    np.savez(tmp_path / "batch.npz", x.numpy(), y.numpy())
    wide = torch.randn(6, 10)
    wide[:, ::2] = x
    forms = [
        (x.numpy(), y.numpy()),
        {"inputs": x, "targets": y},
        {"inputs": (x,), "targets": y},
        {"inputs": {"input": x}, "targets": y},
        (wide[:, ::2], y),
        (x.clone().requires_grad_(True), y.int()),
        tmp_path / "batch.safetensors",
        str(tmp_path / "batch.npz"),
    ]
    for form in forms:
        assert torch.equal(result_of(client, model, form)["0.weight"], expected), form


def test_inputs_by_name_and_by_place(client):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(2, 3)

        def forward(self, first, second):
            return self.a(first) * self.b(second)

    x, z, y = torch.randn(6, 5), torch.randn(6, 2), torch.randint(0, 3, (6,))
    by_place = result_of(client, Two().eval(), {"inputs": (x, z), "targets": y})
    assert set(by_place) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    net = torch.jit.script(Two().eval())
    by_name = result_of(client, net, {"inputs": {"second": z, "first": x}, "targets": y})
    assert torch.equal(result_of(client, net, {"inputs": (x, z), "targets": y})["a.weight"], by_name["a.weight"])


def test_half_precision_models_give_float32_results(client):
    model, (x, y) = small()
    result = client.analyze(model.bfloat16(), (x.bfloat16(), y), ["variance", "outputs"])
    assert result["variance"]["0.weight"].dtype == torch.float32
    assert result["outputs"].dtype == torch.float32
    assert result.manifest.dtype == "bfloat16"


# How a model may be given


def test_a_model_in_training_mode_is_analyzed_as_a_copy_in_eval_mode(client):
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    _, batch = small()
    result = client.analyze(net, batch, ["outputs"])
    assert net.training
    assert torch.allclose(result["outputs"], net.eval()(batch[0]))
    assert any("eval-mode copy" in warning for warning in result.warnings)
    kept = client.analyze(net.train(), batch, ["outputs"], eval=False)
    assert any("dropout was active" in warning for warning in kept.warnings)
    assert not torch.allclose(kept["outputs"], result["outputs"])


def test_a_saved_file_a_script_and_a_trace(client, tmp_path):
    model, (x, y) = small()
    script, trace = torch.jit.script(model), torch.jit.trace(model, x)
    torch.jit.save(script, tmp_path / "model.pt")
    expected = result_of(client, model, (x, y))["2.weight"]
    program = exported(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    files = (tmp_path / "model.pt", str(tmp_path / "model.pt"), tmp_path / "model.pt2")
    for form in (script, trace, program, *files):
        assert torch.equal(result_of(client, form, (x, y))["2.weight"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_module_gives_the_same_in_every_format_and_precision(client, dtype):
    model, (x, y) = small()
    results = {
        way: client.analyze(model.to(dtype), (x.to(dtype), y), ["batch_grad"], format=way)
        for way in ("auto", "export", "script", "trace")
    }
    assert [r.manifest.format for r in results.values()] == ["export", "export", "torchscript", "torchscript"]
    assert {r.manifest.dtype for r in results.values()} == {str(dtype).removeprefix("torch.")}
    assert results["auto"].warnings == results["script"].warnings == []
    for result in results.values():
        assert torch.equal(result["batch_grad"]["0.weight"].clone(), results["auto"]["batch_grad"]["0.weight"].clone())


def test_a_batch_size_that_is_baked_in_is_refused_at_another(client):
    model, (x, y) = small()
    program = torch.export.export(model, (x,))
    with pytest.raises(UnprocessableError, match="its batch size is baked in"):
        client.analyze(program, (x[:3], y[:3]), ["grad"])


def test_losses_and_reductions(client):
    model, (x, y) = small()
    by_module = client.analyze(model, (x, y), ["grad"], loss=nn.CrossEntropyLoss(reduction="sum"))
    by_name = client.analyze(model, (x, y), ["grad"], loss={"name": "cross_entropy"}, reduction="sum")
    assert by_module.loss == by_name.loss
    assert by_module.manifest.reduction == "sum"
    squared = client.analyze(model, (x, torch.randn(6, 3)), ["grad"], loss=nn.MSELoss())
    assert squared.manifest.Z == 18


def test_frozen_parameters_are_left_out_unless_asked_for(client):
    model, batch = small()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in result_of(client, model, batch)
    assert "0.weight" in result_of(client, model, batch, parameters="all")


def test_parameters_by_pattern(client):
    model, batch = small()
    assert list(result_of(client, model, batch, parameters="0.*")) == ["0.weight", "0.bias"]
    assert list(result_of(client, model, batch, parameters=("*.bias",))) == ["0.bias", "2.bias"]
    with pytest.raises(UnprocessableError, match="no parameter matches 'head'; the model's parameters are: 0"):
        result_of(client, model, batch, parameters="head")


def test_seeds(client):
    model, batch = small()
    first, second, other = (client.analyze(model, batch, ["diag_ggn_mc"], seed=s)["diag_ggn_mc"] for s in (1, 1, 2))
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


# Reading results


@pytest.fixture
def counted(server):
    """A client, and the requests it makes."""
    seen = []
    inner = httpx.Client(event_hooks={"request": [seen.append]})
    with inner, Client(server.url, http_client=inner) as client:
        yield client, seen


def lines(seen):
    return [f"{request.method} {request.url.path.split('/')[2]}" for request in seen]


def test_a_warm_tiny_job_is_one_request(counted):
    client, seen = counted
    model, batch = small()
    script = torch.jit.script(model)
    client.analyze(script, batch, ["diag_ggn_mc", "kfac"])
    seen.clear()
    result = client.analyze(script, batch, ["diag_ggn_mc", "kfac"])
    assert result["kfac"]["0.weight"].A.sum() != 0
    assert lines(seen) == ["POST jobs"]


def test_only_what_the_server_lacks_is_uploaded(counted):
    client, seen = counted
    torch.manual_seed(41)
    script = torch.jit.script(nn.Linear(1000, 3))
    x = torch.randn(400, 1000)
    client.analyze(script, (x, torch.zeros(400, dtype=torch.long)), ["grad"])
    assert lines(seen) == ["POST jobs", "PUT models", "POST jobs", "PUT batches", "POST jobs"]
    seen.clear()
    client.analyze(script, (x, torch.ones(400, dtype=torch.long)), ["grad"])
    assert lines(seen) == ["POST jobs", "PUT batches", "POST jobs"]
    seen.clear()
    client.analyze(script, (x, torch.ones(400, dtype=torch.long)), ["variance"])
    assert lines(seen)[:1] == ["POST jobs"]
    assert "PUT" not in " ".join(lines(seen))


def test_shapes_cost_nothing_and_rows_are_read_by_range(counted):
    client, seen = counted
    torch.manual_seed(42)
    net = torch.jit.script(nn.Linear(200, 100))
    x, y = torch.randn(64, 200), torch.randint(0, 100, (64,))
    result = client.analyze(net, (x, y), ["batch_grad"])
    seen.clear()
    gradients = result["batch_grad"]["weight"]
    assert isinstance(gradients, torch.Tensor)
    assert (gradients.shape, gradients.dtype, gradients.nbytes) == ((64, 100, 200), torch.float32, 64 * 20_000 * 4)
    assert len(gradients) == 64
    assert lines(seen) == []
    part = gradients[10:20]
    assert len(seen) == 1
    first, last = seen[0].headers["range"].removeprefix("bytes=").split("-")
    assert int(last) - int(first) + 1 == 10 * 20_000 * 4
    whole = gradients.clone()
    assert len(seen) == 2
    assert torch.equal(part, whole[10:20])
    for index in (3, -1, slice(5, None, 7), (slice(2, 9), 4), (7, slice(0, 3), -2), (slice(60, 99), ..., 5)):
        fresh = client.jobs.get(result.manifest.job_id).result()["batch_grad"]["weight"]
        assert torch.equal(fresh[index], whole[index]), index


def test_lazy_tensors_serve_wherever_tensors_do(client):
    model, batch = small()
    group = client.analyze(model, batch, ["diag_ggn_exact"])["diag_ggn_exact"]
    lazy, twin = group["0.weight"], group["2.bias"]
    plain = lazy.clone()
    assert type(plain) is torch.Tensor
    assert torch.equal(lazy + 1, plain + 1)
    assert torch.equal(1 / (lazy + 1e-3), 1 / (plain + 1e-3))
    assert np.array_equal(np.asarray(lazy), plain.numpy())
    assert torch.equal(torch.cat([lazy.flatten(), twin]), torch.cat([plain.flatten(), twin.clone()]))
    assert repr(lazy) == repr(plain)
    assert torch.equal(lazy[lazy > 0], plain[plain > 0])
    model[0].load_state_dict({"weight": lazy, "bias": group["0.bias"]})
    assert torch.equal(model[0].weight, plain)


def test_saving_streams_everything_into_one_file(client, tmp_path):
    model, batch = small()
    requests = ["batch_loss", "outputs", "batch_grad", KFAC(label="k")]
    result = client.analyze(model.double(), (batch[0].double(), batch[1]), requests)
    path = result.save(tmp_path / "out.safetensors")
    loaded = safetensors.torch.load_file(path)
    assert {"batch_loss", "outputs", "batch_grad/0.weight", "k/0.weight/A", "k/0.weight/B", "k/0.bias/B"} < set(loaded)
    assert torch.equal(loaded["k/0.weight/A"], result["k"]["0.weight"].A)
    assert torch.equal(loaded["batch_loss"], result["batch_loss"])
    with safetensors.safe_open(path, "pt") as file:
        assert result.manifest.job_id in file.metadata()["curvature_manifest"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_fetching_all_makes_the_result_independent_of_the_server(server):
    model, batch = small()
    with Client(server.url) as client:
        result = client.submit(model, batch, ["variance", "kfac"]).result()
        with pytest.raises(Exception, match="more than max_bytes=10"):
            result.fetch_all(max_bytes=10)
        result.fetch_all()
        late = client.submit(model, batch, ["variance"]).result()
    assert result["variance"]["0.weight"].sum() > 0
    with pytest.raises(Exception, match="the client is closed; read results before"):
        late["variance"]["0.weight"].sum()


def test_verification_on_request_stands_in_the_provenance(client):
    model, batch = small()
    found = [
        client.analyze(model, batch, ["variance"], verify=verify)["variance"].entry("0.weight").provenance
        for verify in (False, True)
    ]
    assert all(provenance.verified for provenance in found)
    assert found[0].verification in ("this job", "kept verdict")
    assert found[1].verification == "this job, every column"


def test_the_manifest_says_what_every_tensor_is(client):
    model, batch = small()
    result = client.analyze(model, batch, ["diag_ggn_mc", "variance"], seed=9)
    entry = result["diag_ggn_mc"].entry("0.weight")
    assert (entry.dtype, entry.shape) == ("F32", (4, 5))
    provenance = entry.provenance
    assert (provenance.method, provenance.reduction, provenance.Z, provenance.seed) == ("closed form", "mean", 6.0, 9)
    assert provenance.verified
    assert (provenance.samples_per_chunk, provenance.halvings) == (6, 0)
    assert result["variance"].entry("0.weight").provenance.seed is None
    assert "Σ_n" in result["variance"].convention
    assert "landlock+seccomp" in result.manifest.isolation
    assert {"queue", "fetch", "load", "compute", "write", "store"} <= set(result.manifest.timings_ms)


def test_one_sample_is_analyzed_as_a_plain_module(client):
    net, (x, y) = small()
    result = client.analyze(net, (x[:1], y[:1]), ["batch_grad", BatchDot(against=(x, y), over="model")])
    assert result.manifest.format == "export"
    rows = []
    for n in range(6):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), net.parameters())
        rows.append(torch.cat([g.flatten() for g in gradients]))
    first = torch.cat([result["batch_grad"][name][:].flatten() for name, _ in net.named_parameters()])
    torch.testing.assert_close(first, rows[0])
    torch.testing.assert_close(result["batch_dot"][:], rows[0][None] @ torch.stack(rows).T / 6)


@pytest.mark.parametrize("parameters", [[], 3, [3]])
def test_a_choice_of_parameters_that_names_none_is_refused(client, parameters):
    net, batch = small()
    with pytest.raises(UnprocessableError, match="one or several patterns"):
        client.analyze(net, batch, ["batch_grad"], parameters=parameters)
