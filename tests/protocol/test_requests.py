import pytest
from pydantic import ValidationError

from curvature_protocol import FAMILIES, JobRequest, family_of
from curvature_protocol.errors import STATUS, status_of

MODEL, BATCH = "a" * 64, {"sha256": "b" * 64}


def test_bare_names_stand_for_extensions_and_loss():
    request = JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": ["variance"], "loss": "mse"})
    assert request.extensions[0].key == "variance"
    assert request.loss is not None
    assert request.loss.name == "mse"


def test_two_requests_of_one_extension_need_distinct_labels():
    with pytest.raises(ValidationError, match="labels must be distinct; repeated: kfac"):
        JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": ["kfac", "kfac"]})


def test_reserved_labels_are_refused():
    with pytest.raises(ValidationError, match="reserved"):
        JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": [{"name": "kfac", "label": "loss"}]})


def test_tf32_needs_a_gpu():
    body = {"model": MODEL, "batch": BATCH, "extensions": ["kfac"], "precision": "tf32"}
    with pytest.raises(ValidationError, match="is a GPU's"):
        JobRequest.model_validate(body)
    assert JobRequest.model_validate({**body, "requires": {"gpu": True}}).precision == "tf32"
    with pytest.raises(ValidationError, match="precision"):
        JobRequest.model_validate({**body, "precision": "fp8"})


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError, match="sead"):
        JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": ["kfac"], "sead": 1})


def test_every_code_has_a_status():
    assert {status_of(code) for code in FAMILIES} <= set(STATUS.values())
    assert status_of("job_not_found") == 404
    assert family_of("a code of the future").value == "internal"


@pytest.mark.parametrize("data", ["!!!!", "QUJD\n", "QUJ", "QU JD"])
def test_a_batch_inside_a_request_must_be_base64(data):
    with pytest.raises(ValidationError, match="no base64"):
        JobRequest.model_validate({"model": MODEL, "batch": {"data": data}, "extensions": ["kfac"]})


def test_a_batch_inside_a_request_comes_out_as_it_went_in():
    request = JobRequest.model_validate({"model": MODEL, "batch": {"data": "QUJDAA=="}, "extensions": ["kfac"]})
    assert request.batch.data == b"ABC\x00"
    assert '"QUJDAA=="' in request.model_dump_json()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_limit_of_time_is_a_positive_number(seconds):
    with pytest.raises(ValidationError, match="timeout_seconds"):
        JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": ["kfac"], "timeout_seconds": seconds})


@pytest.mark.parametrize("parameters", ["all", "0.*", ["0.*", "2.bias"]])
def test_parameters_are_a_word_or_patterns(parameters):
    body = {"model": MODEL, "batch": BATCH, "extensions": ["kfac"], "parameters": parameters}
    assert JobRequest.model_validate(body).model_dump(mode="json")["parameters"] == parameters


@pytest.mark.parametrize("parameters", ["", [], [""], 3, [3]])
def test_parameters_are_nothing_else(parameters):
    with pytest.raises(ValidationError, match="parameters"):
        JobRequest.model_validate({"model": MODEL, "batch": BATCH, "extensions": ["kfac"], "parameters": parameters})
