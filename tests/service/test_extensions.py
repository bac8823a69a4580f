"""The catalogue, and requests held against it."""

from datetime import UTC, datetime

import pytest
from tests.service.planting import expect_problem, request_body

from curvature_protocol.catalogue import Catalogue, ExtensionEntry, LossEntry
from curvature_protocol.health import WorkerView
from curvature_protocol.requests import JobRequest
from curvature_service.errors import ApiError
from curvature_service.extensions.service import built_in_catalogue, check_request
from curvature_state.workers import publish_worker


def request(**changes):
    body = {"model": "a" * 64, "batch": {"sha256": "b" * 64}, "extensions": ["grad"]}
    return JobRequest.model_validate({**body, **changes})


def refused(**changes):
    with pytest.raises(ApiError) as caught:
        check_request(built_in_catalogue(), request(**changes))
    return caught.value


def extension(options, name="kfac"):
    return {"extensions": ["grad", {"name": name, "options": options}]}


def test_every_extension_of_the_catalogue_is_accepted_with_its_defaults():
    names = [entry.name for entry in built_in_catalogue().extensions]
    assert "diag_ggn_mc" in names
    check_request(built_in_catalogue(), request(extensions=names))


def test_valid_options_are_accepted():
    check_request(built_in_catalogue(), request(**extension({"mc_samples": 4, "approximation": "reduce"})))


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("batch_gard", "batch_grad"),
        ("KFAC", "kfac"),
        ("DiagGGNMC", "diag_ggn_mc"),
        ("grad_batch", "batch_grad"),
        ("SumGradSquared", "sum_grad_squared"),
    ],
)
def test_an_unknown_extension_is_told_with_the_likely_one_and_all_known(name, guess):
    error = refused(extensions=["grad", name])
    assert (error.code, error.param) == ("unknown_extension", "extensions.1.name")
    assert f"did you mean {guess!r}?" in error.detail
    assert "diag_ggn_exact" in error.remedy


def test_a_name_like_nothing_gets_no_guess():
    assert "did you mean" not in refused(extensions=["zzzzzzzz"]).detail


def test_an_unknown_option_is_told_with_the_likely_one_and_all_known():
    error = refused(**extension({"mc_sample": 4}))
    assert (error.code, error.param) == ("invalid_option", "extensions.1.options")
    assert error.detail == "kfac has no option 'mc_sample'; did you mean 'mc_samples'?"
    assert error.remedy == "kfac takes these options: mc_samples, approximation, fisher, joint_bias, strict"


def test_an_option_of_an_extension_without_options():
    error = refused(**extension({"mc_samples": 4}, "outputs"))
    assert error.remedy == "outputs takes these options: none"


@pytest.mark.parametrize(
    ("options", "param", "word"),
    [
        ({"mc_samples": 0}, "mc_samples", "minimum"),
        ({"mc_samples": "4"}, "mc_samples", "integer"),
        ({"mc_samples": True}, "mc_samples", "integer"),
        ({"mc_samples": 1.5}, "mc_samples", "integer"),
        ({"approximation": "kfac"}, "approximation", "reduce"),
        ({"mc_samples": ["x" * 1000]}, "mc_samples", "x"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, param, word):
    error = refused(**extension(options))
    assert (error.code, error.param) == ("invalid_option", f"extensions.1.options.{param}")
    assert word in error.detail
    assert len(error.detail) < 400


def test_an_unknown_loss_is_told_with_the_known_ones():
    error = refused(loss="crossentropy")
    assert (error.code, error.param) == ("unknown_loss", "loss.name")
    assert "cross_entropy" in error.remedy


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "cross_entropy", "options": {"weight": [1, 0.5], "label_smoothing": 0.1, "class_axis": "last"}},
        {"name": "bce_with_logits", "options": {"pos_weight": [[2.0], [3.0]], "weight": 2}},
        {"name": "poisson_nll", "options": {"log_input": False}},
        {"name": "gaussian_nll", "options": {"var": [0.5, 2.0]}},
        {"name": "huber", "options": {"delta": 0.5, "output": "logits"}},
        {"name": "mse", "options": {"output": 1}},
    ],
)
def test_options_of_losses_are_accepted(loss):
    check_request(built_in_catalogue(), request(loss=loss))


@pytest.mark.parametrize(
    ("name", "options", "param"),
    [
        ("cross_entropy", {"weight": [1.0, -0.5]}, "weight.1"),
        ("cross_entropy", {"weight": 2.0}, "weight"),
        ("cross_entropy", {"label_smoothing": 1.5}, "label_smoothing"),
        ("cross_entropy", {"class_axis": "first"}, "class_axis"),
        ("poisson_nll", {"full": 1}, "full"),
        ("huber", {"delta": 0}, "delta"),
        ("mse", {"output": 1.5}, "output"),
        ("mse", {"output": [0]}, "output"),
    ],
)
def test_an_option_of_a_loss_that_does_not_fit_is_named(name, options, param):
    error = refused(loss={"name": name, "options": options})
    assert (error.code, error.param) == ("invalid_option", f"loss.options.{param}")


def test_no_request_can_name_a_function_as_loss():
    assert refused(loss="custom").code == "unknown_loss"


# Over HTTP, with workers


def loss_entry(name):
    return LossEntry(name=name, summary="s", options={"type": "object"})


def publish(server, name, *extensions, losses=("mse",)):
    entries = tuple(
        ExtensionEntry(
            name=e, summary="s", kind="tensor", shape="[N]", formula="f", source="s", options={"type": "object"}
        )
        for e in extensions
    )
    view = WorkerView(id=name, device="cpu", engine_version="1", isolation="none", seen_at=datetime.now(UTC))
    catalogue = Catalogue(engine_version="1", extensions=entries, losses=tuple(map(loss_entry, losses)))
    publish_worker(server.resources.database, view, catalogue)


@pytest.mark.integration
def test_before_any_worker_the_built_in_catalogue_is_shown(client):
    shown = Catalogue.model_validate_json(client.get("/v1/extensions").content)
    assert shown == built_in_catalogue()


@pytest.mark.integration
def test_workers_own_extensions_are_shown_and_accepted(server):
    publish(server, "w1", "variance")
    publish(server, "w2", "mine", losses=("mse", "huber"))
    shown = server.client.get("/v1/extensions").json()
    assert {e["name"] for e in shown["extensions"]} == {"variance", "mine"}
    assert [loss["name"] for loss in shown["losses"]] == ["mse", "huber"]
    body = request_body(server.client, extensions=["variance", "mine"], loss="huber")
    assert server.client.post("/v1/jobs", json=body).status_code == 201


@pytest.mark.integration
def test_what_no_worker_can_compute_is_refused(server):
    publish(server, "w1", "variance")
    reply = server.client.post("/v1/jobs", json=request_body(server.client, extensions=["kfac"]))
    assert expect_problem(reply, 422, "unknown_extension", "extensions.0.name")["remedy"].endswith("variance")
