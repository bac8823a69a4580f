"""The API key."""

import pytest
from tests.service.planting import expect_problem
from tests.service.server import LiveServer, settings_in

pytestmark = pytest.mark.integration

OPEN = {"/v1/health", "/v1/ready", "/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory, redis_server, sqlite_template):
    settings = settings_in(tmp_path_factory.mktemp("locked"), redis_server, sqlite_template, api_key="secret")
    with LiveServer(settings) as server:
        yield server


def test_every_documented_path_but_health_needs_the_key(locked):
    tried = 0
    for path, verbs in locked.app.openapi()["paths"].items():
        for verb in verbs:
            if path in OPEN or verb == "head":
                continue
            url = path.format(sha256="0" * 64, job_id="0" * 32, label="grad")
            expect_problem(locked.client.request(verb, url), 401, "unauthenticated")
            tried += 1
    assert tried > 10


def test_head_needs_the_key(locked):
    assert locked.client.head(f"/v1/models/{'0' * 64}").status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_readiness_and_documentation_are_open(locked, path):
    assert locked.client.get(path).status_code in (200, 503)


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secre\xe9"])
def test_a_wrong_key_is_refused(locked, header):
    reply = locked.client.get("/v1/jobs", headers={"Authorization": header.encode("latin-1")})
    problem = expect_problem(reply, 401, "unauthenticated")
    assert "CURVATURE_API_KEY" in problem["remedy"]
    assert reply.headers["www-authenticate"] == "Bearer"


def test_the_key_opens(locked):
    assert locked.client.get("/v1/jobs", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_the_key_is_asked_for_before_the_body_is_read(locked):
    reply = locked.client.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    expect_problem(reply, 401, "unauthenticated")


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_configured_key_all_is_open(serve, key):
    assert serve(api_key=key).client.get("/v1/jobs").status_code == 200


def test_the_key_is_not_shown_with_the_settings(make_settings):
    assert "secret" not in repr(make_settings(api_key="secret"))
