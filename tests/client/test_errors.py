"""The tree of errors."""

import pickle

import pytest

from curvature_client import _errors
from curvature_protocol.errors import FAMILIES, STATUS, Problem


def _problem(code: str) -> Problem:
    return Problem(title="t", status=422, detail="what came", code=code, param="targets", remedy="cast them")


@pytest.mark.parametrize("code", sorted(FAMILIES))
def test_a_failed_job_is_also_of_its_codes_family(code: str) -> None:
    error = _errors.job_failed("job-1", _problem(code))

    assert isinstance(error, _errors.JobFailed)
    assert isinstance(error, _errors.FAMILY_CLASSES[FAMILIES[code]])
    assert (error.code, error.param, error.remedy, error.job_id) == (code, "targets", "cast them", "job-1")


@pytest.mark.parametrize("family", sorted(STATUS))
def test_each_family_has_its_status(family) -> None:
    assert _errors.FAMILY_CLASSES[family].status_code == STATUS[family]


def test_a_reply_without_an_explanation_still_finds_its_class() -> None:
    assert isinstance(_errors.status_error(502, None), _errors.ServiceUnavailableError)
    assert isinstance(_errors.status_error(404, None), _errors.NotFoundError)
    assert isinstance(_errors.status_error(418, None), _errors.BadRequestError)
    assert isinstance(_errors.status_error(599, None), _errors.InternalServerError)


def test_message_and_remedy_are_both_shown() -> None:
    error = _errors.status_error(422, _problem("invalid_targets"), "request-7")

    assert str(error) == "what came; cast them"
    assert error.request_id == "request-7"


@pytest.mark.parametrize(
    "error",
    [
        _errors.status_error(422, _problem("invalid_targets"), "request-7"),
        _errors.job_failed("job-1", _problem("invalid_targets")),
        _errors.JobFailed("plain", code="x"),
        _errors.WaitTimeout("slow", code="wait_timeout", remedy="wait longer"),
    ],
    ids=["status", "failed", "plain", "timeout"],
)
def test_errors_survive_pickling(error) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


def test_a_wait_that_times_out_is_a_timeout_error() -> None:
    assert issubclass(_errors.WaitTimeout, TimeoutError)
