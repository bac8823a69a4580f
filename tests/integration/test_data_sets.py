"""Data sets through a real server: what the shards leave comes to what one batch gives."""

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.integration.cases import LONG, long_running
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvature_engine as engine
from curvature_client import ConflictError, JobFailed, UnprocessableError

REQUESTS = [
    *("batch_loss", "outputs", "grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance"),
    *("gradient_noise_scale", "diag_ggn_exact", "sqrt_ggn_exact", "batch_diag_ggn_exact", "diag_hessian", "kflr"),
    {"name": "kfac", "options": {"mc_samples": 3}},
    {"name": "diag_ggn_mc", "options": {"mc_samples": 2}},
    {"name": "sqrt_ggn_mc", "options": {"mc_samples": 2}},
]


def data(samples=13):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    return net, torch.randn(samples, 5).double(), torch.randint(0, 3, (samples,))


def loader(x, y, size=4):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def close(ours, theirs):
    scale = theirs.abs().max()
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert float((ours[...] - theirs).abs().max()) <= 1e-12 * float(scale)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_data_set_has_the_result_of_one_batch(client, tmp_path, reduction):
    net, x, y = data()
    expected = engine.analyze(net, x, y, REQUESTS, reduction=reduction, seed=3)
    result = client.analyze(net, loader(x, y), REQUESTS, reduction=reduction, seed=3)  # the last part has one sample
    assert (result.manifest.parts, result.manifest.samples) == (4, 13)
    assert {"mean": 13, "sum": 1}[reduction] == result.manifest.Z
    assert result.manifest.format == "export"
    assert list(result) == list(expected.groups)
    assert result.loss == pytest.approx(float(expected.loss), rel=1e-13)
    saved = safetensors.torch.load_file(result.save(tmp_path / "all.safetensors"))
    for label, group in expected.groups.items():
        for key, tensor in group.tensors.items():
            close(saved[label if key == label else f"{label}/{key}"], tensor)
        if group.kind == "tensor":
            close(result[label], group.tensors[label])
        elif group.kind == "parameters":
            for name in group.tensors:
                close(result[label][name], group.tensors[name])
    rows = result["batch_grad"]["0.weight"]
    close(rows[3:9], expected["batch_grad"]["0.weight"][3:9])
    assert result["batch_grad"].entry("0.weight").parts
    assert result.nbytes == sum(
        tensor.nbytes for group in expected.groups.values() for tensor in group.tensors.values()
    )


def test_asked_again_the_answer_comes_from_the_cache_and_says_so(client):
    net, x, y = data()
    x += 6
    first = client.analyze(net, list(loader(x, y)), ["batch_grad", "kflr"], seed=11)
    again = client.analyze(net, (pair for pair in loader(x, y)), ["batch_grad", "kflr"], seed=11)
    assert again.from_cache == dict.fromkeys(["batch_grad", "kflr"], first.manifest.job_id)
    assert "from the cache: batch_grad, kflr" in repr(again)
    assert torch.equal(again["batch_grad"]["0.bias"] * 1, first["batch_grad"]["0.bias"] * 1)
    assert torch.equal(again["kflr"]["0.bias"].B * 1, first["kflr"]["0.bias"].B * 1)
    anew = client.analyze(net, loader(x, y), ["kflr"], seed=11, cache=False)
    assert anew.from_cache == {}


def test_one_quantity_alone_comes_from_the_cache(client):
    net, x, y = data(6)
    client.analyze(net, (x, y), ["batch_l2"], seed=12)
    result = client.analyze(net, (x, y), ["batch_l2", "batch_loss"], seed=12)
    assert list(result.from_cache) == ["batch_l2"]
    close(result["batch_loss"], engine.analyze(net, x, y, ["batch_loss"])["batch_loss"])


def test_a_part_that_was_computed_elsewhere_in_another_data_set_is_taken_from_there(client):
    net, x, y = data(9)
    x += 5
    client.analyze(net, loader(x, y, 3), ["grad", "batch_loss"])
    result = client.analyze(net, [(x[:3], y[:3]), (x[6:], y[6:])], ["grad", "batch_loss"])
    rest = [0, 1, 2, 6, 7, 8]
    expected = engine.analyze(net, x[rest], y[rest], ["grad", "batch_loss"])
    close(result["grad"]["0.weight"], expected["grad"]["0.weight"])
    close(result["batch_loss"], expected["batch_loss"])


def test_a_job_over_a_data_set_says_what_it_is_of(client):
    net, x, y = data(8)
    job = client.submit(net, loader(x + 1, y), ["grad"], metadata={"run": "1"})
    assert (job.parts, job.parent, job.sweep, job.coordinates, job.pinned) == (2, None, None, None, False)
    told = list(job.events())
    assert told[0].status == "waiting"
    done = [event.progress.done for event in told if event.status == "waiting"]
    assert done == sorted(done)
    assert told[-1].status == "succeeded"
    entry = client.analyze(net, loader(x + 1, y), ["batch_loss"]).manifest.groups[0].tensors[0]
    shard = client.jobs.get(entry.parts[1].job_id)
    parent = client.jobs.get(shard.parent)
    assert (parent.parts, shard.request["part"]["first_sample"]) == (2, 4)


def test_a_part_at_fault_is_named_and_only_it_is_computed_again(client):
    net, x, y = data(8)
    y[6] = 7
    job = client.submit(net, loader(x + 2, y), ["grad"]).wait(60)
    assert isinstance(job.error, UnprocessableError)
    assert "part 1 of 2" in str(job.error)
    with pytest.raises(JobFailed):
        job.result()
    assert job.retry().status == "waiting"
    assert job.progress.total == 2
    assert job.wait(60).status == "failed"
    y[6] = 0
    good = client.submit(net, loader(x + 2, y), ["grad"])
    good.result()
    with pytest.raises(ConflictError, match="only a failed or cancelled job is retried"):
        good.retry()


def test_a_cancelled_job_is_taken_up_again(client):
    net, batch = long_running()
    job = client.submit(net, batch, **LONG).cancel()
    assert job.wait(60).status == "cancelled"
    assert job.retry().status == "queued"
    assert job.cancel().wait(60).status == "cancelled"


def test_what_takes_the_whole_batch_is_refused_with_the_reason(client):
    net, x, y = data(8)
    count = len(client.jobs.list(limit=200))
    with pytest.raises(UnprocessableError, match="cannot be merged from the parts of a data set") as caught:
        client.analyze(net, loader(x, y), ["grad", "batch_dot"])
    assert (caught.value.code, caught.value.param) == ("whole_batch_required", "extensions.1.name")
    assert len(client.jobs.list(limit=200)) == count


class Recurrent(nn.Module):
    """Layers that torch exports for several samples only."""

    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(5, 3, batch_first=True)

    def forward(self, x):
        return self.l(x)[0][:, -1]


def test_a_last_part_of_one_sample_goes_through_a_module_that_treats_it_differently(client):
    torch.manual_seed(0)
    net, x, y = Recurrent().double().eval(), torch.randn(5, 4, 5).double(), torch.randint(0, 3, (5,))
    result = client.analyze(net, loader(x, y, 2), ["batch_grad"])
    assert result.manifest.format == "torchscript"
    expected = engine.analyze(torch.jit.script(net), x, y, ["batch_grad"])["batch_grad"]
    for name, tensor in expected.items():
        close(result["batch_grad"][name], tensor)


def test_a_plan_is_of_the_first_batch(client):
    net, x, y = data(8)
    assert client.plan(net, loader(x, y, 3), ["batch_grad"]).N == 3


def test_a_job_that_no_worker_may_take_waits(client):
    net, x, y = data(8)
    job = client.submit(net, (x + 3, y), ["grad"], requires={"tag": "nowhere"}, priority=9)
    assert (job.request["requires"]["tag"], job.priority) == ("nowhere", 9)
    client.analyze(net, (x + 4, y), ["grad"], priority=0)  # of lower priority, and yet first
    assert job.refresh().status == "queued"
    job.cancel()


def test_numpy_will_do(client, server, tmp_path):
    net, x, y = data(6)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(net), script)
    (tmp_path / "model.pt").write_bytes(script.getvalue())
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    program = """
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from curvature_client import Client
        data = np.load("data.npz")
        with Client() as client:
            parts = [(data["x"][:4], data["y"][:4]), (data["x"][4:], data["y"][4:])]
            result = client.analyze("model.pt", parts, ["batch_grad", "variance"])
            rows = result["batch_grad"]["0.weight"]
            np.savez("out.npz", rows=rows, some=rows[3:5], variance=result["variance"]["0.weight"])
            result.save("out.safetensors")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "CURVATURE_URL": server.url},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    expected = engine.analyze(torch.jit.script(net), x, y, ["batch_grad", "variance"])
    found = np.load(tmp_path / "out.npz")
    close(torch.from_numpy(found["rows"]), expected["batch_grad"]["0.weight"])
    close(torch.from_numpy(found["some"]), expected["batch_grad"]["0.weight"][3:5])
    close(torch.from_numpy(found["variance"]), expected["variance"]["0.weight"])
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "out.safetensors")["batch_grad/0.weight"],
        torch.from_numpy(found["rows"]),
    )
