"""Requests: retries, errors, address and key, against a server that fails on purpose."""

import json

import httpx
import pytest
from tests.client.scripted_server import answering, reply

from curvature_client import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    Client,
    CurvatureError,
    NotFoundError,
    ServiceUnavailableError,
    UnprocessableError,
)
from curvature_client._downloads import StoredFile
from curvature_client._transport import Transport
from curvature_protocol import Problem

CATALOGUE = b'{"engine_version": "1", "extensions": [], "losses": [{"name": "mse", "summary": "", "options": {}}]}'


def failing(times, status, **headers):
    left = [times]

    def answer(handler, body):
        if left[0]:
            left[0] -= 1
            reply(handler, status, headers=headers)
        else:
            reply(handler, 200, CATALOGUE)

    return answer


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(status):
    with answering(failing(2, status)) as (url, seen), Client(url) as client:
        assert client.extensions().losses[0].name == "mse"
    assert len(seen) == 3


def test_after_the_last_retry_the_error_is_the_users():
    with answering(failing(9, 503)) as (url, seen), Client(url, max_retries=1) as client:
        with pytest.raises(ServiceUnavailableError, match="503"):
            client.extensions()
    assert len(seen) == 2


def test_what_cannot_pass_is_not_repeated():
    with answering(failing(9, 500)) as (url, seen), Client(url) as client, pytest.raises(CurvatureError):
        client.extensions()
    assert len(seen) == 1


def test_a_connection_that_breaks_is_made_again():
    broken = [2]

    def answer(handler, body):
        if broken[0]:
            broken[0] -= 1
            handler.connection.close()
            handler.close_connection = True
        else:
            reply(handler, 200, CATALOGUE)

    with answering(answer) as (url, _), Client(url) as client:
        assert client.extensions().losses[0].name == "mse"


def test_a_download_goes_on_where_it_broke():
    data = bytes(range(256)) * 40_000
    broken = [3]

    def answer(handler, body):
        first, last = (int(n) for n in handler.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        if broken[0]:
            broken[0] -= 1
            handler.wfile.write(part[: 10 + len(part) // 3])
            handler.wfile.flush()
            handler.connection.shutdown(2)
            handler.close_connection = True
        else:
            handler.wfile.write(part)

    with answering(answer) as (url, seen):
        transport = Transport(url, None, 5.0, 3, None)
        assert bytes(StoredFile(transport, "/file", len(data)).read(100, len(data) - 7)) == data[100:-7]
        transport.close()
    starts = [int(headers["Range"].removeprefix("bytes=").split("-")[0]) for _, _, headers in seen]
    assert starts[0] == 100
    assert starts == sorted(set(starts))
    assert len(starts) == 4


def test_a_server_that_does_not_answer_in_time():
    def answer(handler, body):
        handler.rfile.read(1)  # until the client gives up

    with answering(answer) as (url, _), Client(url, timeout=0.2, max_retries=0) as client:
        with pytest.raises(APITimeoutError, match="did not answer in time") as caught:
            client.extensions()
    assert isinstance(caught.value, APIConnectionError)


def test_problem_details_become_the_exception():
    problem = Problem(title="t", status=422, detail="what came", code="invalid_option", param="x", remedy="do y")

    def answer(handler, body):
        reply(handler, 422, problem.model_dump_json().encode(), {"X-Request-ID": "r1"})

    with answering(answer) as (url, _), Client(url) as client:
        with pytest.raises(UnprocessableError, match="what came; do y") as caught:
            client.extensions()
    error = caught.value
    assert (error.code, error.param, error.remedy, error.request_id) == ("invalid_option", "x", "do y", "r1")


def test_another_kind_of_server_is_recognised():
    with answering(lambda handler, body: reply(handler, 200, b"<html>")) as (url, _), Client(url) as client:
        with pytest.raises(APIConnectionError, match="not as a Curvature server does"):
            client.extensions()


def test_address_and_key_come_from_the_environment(monkeypatch):
    with answering(lambda handler, body: reply(handler, 401)) as (url, seen):
        monkeypatch.setenv("CURVATURE_URL", url + "/")
        monkeypatch.setenv("CURVATURE_API_KEY", "secret")
        with Client() as client, pytest.raises(AuthenticationError):
            client.extensions()
        with Client(api_key="other") as client, pytest.raises(AuthenticationError):
            client.extensions()
    assert [headers["Authorization"] for _, _, headers in seen] == ["Bearer secret", "Bearer other"]
    assert seen[0][1] == "/v1/extensions"


def test_a_client_of_the_users_own_stays_open():
    with answering(failing(0, 200)) as (url, _), httpx.Client(base_url=url) as inner:
        with Client(http_client=inner) as client:
            assert client.base_url == url
            client.extensions()
        assert not inner.is_closed


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "nonsense"])
def test_an_address_must_be_one(url):
    with pytest.raises(CurvatureError, match="address must be like http"):
        Client(url)


def test_waiting_outlasts_a_server_that_fails_for_a_while():
    view = {"id": "j", "status": "running", "created_at": "2026-01-01T00:00:00Z", "request": {}}
    answers = [(500, b"{}"), (502, b""), (200, b"<html>"), (200, json.dumps({**view, "status": "succeeded"}).encode())]

    def answer(handler, body):
        status, data = answers.pop(0) if "wait" in handler.path else (200, json.dumps(view).encode())
        reply(handler, status, data)

    with answering(answer) as (url, _), Client(url, progress=False) as client:
        assert client.jobs.get("j").wait(30).status == "succeeded"
    assert answers == []


def test_waiting_ends_where_the_server_does_not_know_the_job_any_more():
    view = {"id": "j", "status": "running", "created_at": "2026-01-01T00:00:00Z", "request": {}}

    def answer(handler, body):
        known = "wait" not in handler.path
        reply(handler, 200 if known else 404, json.dumps(view).encode() if known else b"")

    with answering(answer) as (url, _), Client(url, progress=False) as client, pytest.raises(NotFoundError):
        client.jobs.get("j").wait(30)


def test_an_empty_id_is_refused_at_once():
    with Client("http://127.0.0.1:9") as client, pytest.raises(NotFoundError, match="the job's id is empty"):
        client.jobs.get("")
