"""Sweeps: submitted, followed row by row, found again, cancelled, retried; on a real server with a real worker."""

import signal
import subprocess
import sys

import httpx
import pytest
import torch
from tests.integration.cases import LONG, long_running, small
from tests.integration.serving import wait_for
from torch import nn

from curvature_client import Client, JobCancelled, NotFoundError, UnprocessableError, WaitTimeout


def nets():
    """Two models of one kind of batch, and the batch."""
    net, batch = small()
    torch.manual_seed(1)
    return net, nn.Linear(5, 3).eval(), batch


def half_squared(outputs, targets):
    return 0.5 * (outputs - nn.functional.one_hot(targets, 3)).square().sum(1)


def is_computing(job):
    return job.refresh().progress and job.progress.phase == "computing"


def test_every_row_of_a_grid_is_what_a_job_of_its_own_gives(client, one_thread):
    first, second, batch = nets()
    losses = ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), half_squared]
    sweep = client.sweep(
        grid={"model": {"net": first, "linear": second}, "loss": losses, "seed": range(2)},
        batch=batch,
        extensions=["diag_ggn_mc"],
        metadata={"run": "a"},
    )
    assert (len(sweep), sweep.axes, sweep.metadata) == (12, ("model", "loss", "seed"), {"run": "a"})
    rows = {tuple(row.coordinates.values()): row for row in sweep.completed(timeout=120)}
    names = ["cross_entropy", "CrossEntropyLoss", "half_squared"]
    assert set(rows) == {(model, loss, seed) for model in ("net", "linear") for loss in names for seed in range(2)}
    for model, model_name in ((first, "net"), (second, "linear")):
        for loss, loss_name in zip(losses, names, strict=True):
            alone = client.analyze(model, batch, ["diag_ggn_mc"], loss=loss, seed=1)
            found = rows[model_name, loss_name, 1].result()
            assert found.loss == alone.loss
            parameters = list(alone["diag_ggn_mc"])
            assert parameters == list(found["diag_ggn_mc"])
            for name in parameters:
                assert torch.equal(found["diag_ggn_mc"][name], alone["diag_ggn_mc"][name])
    assert sweep.refresh().done
    assert sweep.counts == {"succeeded": 12}


def test_models_and_batches_are_uploaded_once_however_many_rows_use_them(server):
    first, second, batch = nets()
    sent = []
    with httpx.Client(
        event_hooks={"request": [lambda request: sent.append((request.method, request.url.path))]}
    ) as http:
        client = Client(server.url, http_client=http)
        scale = float(torch.rand(()))  # no other test has uploaded these
        batches = [(batch[0] * scale, batch[1]), (batch[0][:4] * scale, batch[1][:4])]
        sweep = client.sweep(
            rows=[
                {"model": model, "batch": rows, "seed": seed}
                for model in (first, second)
                for rows in batches
                for seed in range(50)
            ],
            extensions=["grad"],
        )
        assert len(sweep) == 200
        assert sum(method == "PUT" and "/batches/" in path for method, path in sent) == 2
        assert sum(method == "PUT" and "/models/" in path for method, path in sent) <= 2
        assert sum(method == "POST" for method, _ in sent) == 1
        assert len(sent) < 10
        sweep.cancel()


def test_the_batch_is_the_example_by_which_a_model_is_exported(client):
    _, _, (x, y) = nets()

    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x * 2)

    sweep = client.sweep(
        grid={"batch": {"six": (x, y), "four": (x[:4], y[:4])}}, model=Doubling(), extensions=["batch_loss"]
    )
    results = [row.result() for row in sweep.wait(60).rows]
    assert [result.manifest.format for result in results] == ["export", "export"]
    assert [result["batch_loss"].shape for result in results] == [(6,), (4,)]
    # It was in training mode: every row of the model says so.
    assert all("eval-mode copy" in result.warnings[0] for result in results)


def test_a_module_is_converted_in_each_mode_that_rows_ask_for(client):
    _, _, batch = nets()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    sweep = client.sweep(grid={"eval": [True, False]}, model=model, batch=batch, extensions=["grad"])
    evaluated, trained = (row.result() for row in sweep.wait(60).rows)
    assert [row.coordinates for row in sweep.rows] == [{"eval": True}, {"eval": False}]
    assert evaluated.loss == client.analyze(model, batch, ["grad"]).loss
    assert trained.loss != evaluated.loss


def test_a_row_over_a_data_set_equals_its_single_batch(client):
    _, model, (x, y) = nets()
    model, x = model.double(), x.double()
    loader = [(x[:2], y[:2]), (x[2:], y[2:])]
    sweep = client.sweep(
        grid={"batch": {"whole": (x, y), "parts": loader}, "seed": [0, 3]},
        model=model,
        extensions=["variance", "diag_ggn_mc"],
    )
    rows = sweep.wait(60).rows
    assert [row.job.parts for row in rows] == [None, None, 2, 2]
    for whole, parts in zip(rows[:2], rows[2:], strict=True):
        for label in ("variance", "diag_ggn_mc"):
            torch.testing.assert_close(
                parts.result()[label]["weight"].clone(), whole.result()[label]["weight"].clone(), rtol=1e-12, atol=0
            )


def test_failures_are_reported_row_by_row(client):
    model, _, (x, y) = nets()
    sweep = client.sweep(
        rows=[{"batch": (x, y)}, {"batch": (x, y + 7)}, {"batch": (x[:, :4], y)}], model=model, extensions=["grad"]
    )
    rows = {row.number: row for row in sweep.completed(timeout=60)}
    assert sweep.refresh().counts == {"succeeded": 1, "failed": 2}
    assert rows[0].result().loss > 0
    assert (rows[1].error.code, rows[2].error.code) == ("invalid_targets", "invalid_inputs")
    with pytest.raises(UnprocessableError, match="class indices must lie in"):
        rows[1].result()
    assert [row.number for row in sweep.rows_in("failed")] == [1, 2]


def test_a_sweep_is_found_again_from_anywhere_with_its_coordinates(client, server):
    _, model, batch = nets()
    sweep = client.sweep(grid={"seed": [3, 1]}, model=model, batch=batch, extensions=["grad"])
    with Client(server.url) as another:
        found = another.sweeps.get(sweep.id)
        assert [row.coordinates for row in found.completed(timeout=60)] == [{"seed": 3}, {"seed": 1}]
        assert another.sweeps.list(limit=1)[0].id == sweep.id
        job = found.rows[1].job
    assert (job.sweep, job.coordinates, job.request["seed"]) == (sweep.id, {"seed": 1}, 1)


def test_a_table_holds_coordinates_losses_and_errors(client):
    _, model, (x, y) = nets()
    sweep = client.sweep(
        grid={"batch": {"good": (x, y), "bad": (x, y + 7)}, "loss": ["cross_entropy"]}, model=model, extensions=["grad"]
    ).wait(60)
    table = sweep.to_dataframe()
    assert table[["batch", "loss", "status"]].to_numpy().tolist() == [
        ["good", "cross_entropy", "succeeded"],
        ["bad", "cross_entropy", "failed"],
    ]
    assert table["loss_value"][0] == sweep.rows[0].result().loss
    assert table["error"][1].startswith("invalid_targets: ")
    assert (table["running_seconds"] > 0).all()


def test_a_refused_sweep_says_which_value_is_at_fault(client):
    _, model, batch = nets()
    with pytest.raises(UnprocessableError, match="did you mean 'kfac'") as caught:
        client.sweep(grid={"extensions": [["grad"], ["grad", "kfacs"]]}, model=model, batch=batch)
    assert caught.value.param == "grid.extensions.1.1.name"


def test_a_sweep_that_does_not_exist(client):
    with pytest.raises(NotFoundError, match="there is no sweep 'nothing'") as caught:
        client.sweeps.get("nothing")
    assert caught.value.code == "sweep_not_found"


@pytest.fixture
def held(client):
    """A sweep whose first row keeps the worker busy; the second waits, and nothing like it was computed before."""
    model, batch = long_running()
    other, _, (x, y) = nets()
    torch.seed()
    unseen = (torch.randn_like(x), y)
    rows = [
        {"model": model, "batch": batch, "extensions": LONG["extensions"], "loss": LONG["loss"]},
        {"model": other, "batch": unseen, "extensions": ["grad"]},
    ]
    sweep = client.sweep(rows=rows)
    first = sweep.rows[0].job
    wait_for(lambda: is_computing(first), 60, "the first row to compute")
    yield sweep, rows[1]
    sweep.cancel().wait(30)


def test_a_wait_that_ends_too_early_leaves_the_sweep_running(held):
    sweep, _ = held
    with pytest.raises(WaitTimeout, match=r"2 of the 2 jobs .* the sweep goes on") as caught:
        sweep.wait(timeout=0.3)
    assert caught.value.sweep_id == sweep.id
    assert sweep.refresh().counts == {"running": 1, "queued": 1}


def test_what_is_cancelled_can_be_taken_up_again(held):
    sweep, _ = held
    assert sweep.cancel().counts == {"cancelling": 1, "cancelled": 1}
    assert sweep.wait(30).counts == {"cancelled": 2}
    with pytest.raises(JobCancelled):
        sweep.rows[1].result()
    assert sweep.retry_failed().counts == {"queued": 2}
    first = sweep.rows[0].job
    wait_for(lambda: is_computing(first), 60, "the first row to compute again")
    first.cancel()
    assert sweep.wait(60).counts == {"cancelled": 1, "succeeded": 1}
    assert sweep.rows[1].result().loss > 0


def test_what_failed_succeeds_once_its_cause_is_removed(server, client, held):
    sweep, second = held
    rows = sweep.rows
    sha256 = rows[1].job.request["batch"]["sha256"]
    (stored,) = [path for path in server.data_dir.rglob(sha256) if path.parent.name == "batches"]
    stored.unlink()
    rows[0].job.cancel()
    assert sweep.wait(60).counts == {"cancelled": 1, "failed": 1}
    assert sweep.rows[1].error.code == "batch_not_found"
    client.submit(**second).wait(60)  # brings the batch once more
    sweep.retry_failed()
    first = rows[0].job
    wait_for(lambda: is_computing(first), 60, "the first row to compute again")
    first.cancel()
    assert sweep.wait(60).counts == {"cancelled": 1, "succeeded": 1}


def test_a_sweep_outlasts_the_api_and_the_broker(own_server):
    _, model, batch = nets()
    with Client(own_server.url) as client:
        sweep = client.sweep(grid={"seed": range(60)}, model=model, batch=batch, extensions=["diag_ggn_mc"])
        seen = []
        for row in sweep.completed(timeout=120):
            seen.append((row.number, row.status))
            if len(seen) == 5:
                for name in ("-m", "curvature_service"), ("--unixsocket",), ("unixsocket:",):
                    for process in own_server.find(*name):
                        process.kill()
        assert sorted(seen) == [(number, "succeeded") for number in range(60)]


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
from curvature_client import Client
sweep = Client(sys.argv[1]).sweeps.get(sys.argv[2])
print("waiting", flush=True)
sweep.wait()
"""


def test_an_interrupted_wait_leaves_the_sweep_running(server, held):
    sweep, _ = held
    command = [sys.executable, "-c", PROGRAM, server.url, sweep.id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert sweep.refresh().counts == {"running": 1, "queued": 1}
