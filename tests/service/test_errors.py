"""Every failure has the one body, and none shows a traceback."""

import json
import logging
import socket

import pytest
from sqlalchemy import update
from tests.service.planting import expect_problem, request_body, sha256, submit, upload

from curvature_state.tables import JobRow

pytestmark = pytest.mark.integration


def test_an_unknown_path(client):
    problem = expect_problem(client.get("/v1/nothing"), 404, "not_found")
    assert problem["remedy"] == "see /docs for the API's paths"


def test_a_verb_that_a_path_does_not_take(client):
    reply = client.delete("/v1/jobs")
    expect_problem(reply, 405, "invalid_request")
    assert reply.headers["allow"]


def test_the_callers_request_id_comes_back(client):
    reply = client.get("/v1/nothing", headers={"X-Request-ID": "mine-1"})
    assert expect_problem(reply, 404, "not_found")["request_id"] == "mine-1"


def test_an_insane_request_id_is_replaced(client):
    reply = client.get("/v1/nothing", headers={"X-Request-ID": "a b" * 100})
    assert expect_problem(reply, 404, "not_found")["request_id"].isalnum()


def test_successes_carry_a_request_id_too(client):
    assert client.get("/v1/health").headers["x-request-id"]


def test_an_unforeseen_error_is_logged_under_its_request_id_and_told_without_traceback(server, caplog):
    submit(server.client)
    with server.resources.database.write() as session:
        session.execute(update(JobRow).values(warnings="of another version", request=5))  # a row that cannot be shown
    with caplog.at_level(logging.ERROR, "curvature.service"):
        reply = server.client.get("/v1/jobs", headers={"X-Request-ID": "r1"})
    assert "validation" not in reply.text
    assert expect_problem(reply, 500, "internal_error")["request_id"] == "r1"
    (record,) = [r for r in caplog.records if r.name == "curvature.service"]
    assert "r1" in record.getMessage()
    assert record.exc_info is not None


def test_an_absent_database_is_503_and_named(serve):
    server = serve(database_url="postgresql://nobody@127.0.0.1:1/none")
    problem = expect_problem(server.client.get("/v1/jobs"), 503, "unavailable")
    assert problem["detail"] == "the server's database does not answer"
    assert problem["remedy"]


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=x", "limit"), ("status=done", "status"), ("limit=201", "limit")]
)
def test_a_wrong_query_parameter_is_named(client, query, param):
    expect_problem(client.get(f"/v1/jobs?{query}"), 422, "invalid_request", param)


# Bodies


def post(client, content, media_type="application/json"):
    return client.post("/v1/jobs", content=content, headers={"Content-Type": media_type})


@pytest.mark.parametrize("body", [b"", b"{", b"[1,", b"\xff\xfe", b"nonsense", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json(client, body):
    assert "no JSON" in expect_problem(post(client, body), 422, "invalid_request")["detail"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know(client, number):
    body = f'{{"model": "{"0" * 64}", "timeout_seconds": {number}}}'
    assert "no number" in expect_problem(post(client, body), 422, "invalid_request")["detail"]


@pytest.mark.parametrize("text", [rb'{"\ud800": 1}', rb'{"metadata": {"a": "\uDfff"}}'])
def test_half_a_surrogate_pair(client, text):
    assert "surrogates not allowed" in expect_problem(post(client, text), 422, "invalid_request")["detail"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_of_another_type(client, media_type):
    expect_problem(post(client, b"{}", media_type), 422, "invalid_request", "Content-Type")


def test_a_media_type_with_parameters(client):
    problem = expect_problem(post(client, b"[]", "application/json; charset=utf-8"), 422, "invalid_request")
    assert "JobRequest" in problem["detail"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "abc"}, "model"),
        ({"seed": "x"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"priority": 10}, "priority"),
        ({"reduction": "median"}, "reduction"),
        ({"sead": 1}, "sead"),
        ({"extensions": []}, "extensions"),
        ({"extensions": [{"label": "x"}]}, "extensions.0.name"),
        ({"extensions": [{"name": "grad", "label": "a/b"}]}, "extensions.0.label"),
        ({"batch": {"sha256": "abc"}}, "batch.sha256"),
        ({"batch": {"sha": "0" * 64}}, "batch.sha256"),
        ({"batch": None}, "batch"),
        ({"batch": {"data": 5}}, "batch.data"),
        ({"extensions": [""]}, "extensions.0"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_the_field_at_fault_is_named_as_the_caller_wrote_it(client, changes, param):
    reply = post(client, json.dumps(request_body(client, **changes)).encode())
    problem = expect_problem(reply, 422, "invalid_request", param)
    assert "Value error" not in problem["detail"]


def test_repeated_labels_are_named(client):
    reply = client.post("/v1/jobs", json=request_body(client, extensions=["grad", "grad"]))
    assert "labels must be distinct; repeated: grad" in expect_problem(reply, 422, "invalid_request")["detail"]


def test_a_client_that_goes_away_is_no_error_of_the_server(server, caplog):
    with caplog.at_level(logging.INFO, "curvature.service"), socket.create_connection(server.address) as connection:
        head = f"PUT /v1/models/{sha256(b'x')} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"
        connection.sendall(head.encode())
    upload(server.client)
    assert [r.levelname for r in caplog.records if r.levelno > logging.INFO] == []
