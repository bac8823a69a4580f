"""The API on PostgreSQL: what another database could do differently."""

import pytest
from tests.service.planting import claim, expect_problem, request_body, submit, succeed
from tests.service.server import LiveServer, settings_in
from tests.service.test_jobs import post

from curvature_state import migrate

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def module_server(tmp_path_factory, redis_server, sqlite_template, postgres):
    url = postgres.url(postgres.create_database())
    migrate(url)
    folder = tmp_path_factory.mktemp("postgresql")
    with LiveServer(settings_in(folder, redis_server, sqlite_template, database_url=url)) as server:
        yield server


@pytest.fixture
def server(module_server):
    module_server.reset()
    return module_server


def test_a_job_goes_its_way(server):
    job = submit(server.client)
    file = succeed(server, job)
    assert server.client.get(f"/v1/jobs/{job.id}").json()["status"] == "succeeded"
    assert server.client.get(f"/v1/jobs/{job.id}/result/variance.safetensors").content == file


def test_a_key_makes_one_job(server):
    body = request_body(server.client)
    assert post(server.client, body, "k").json() == post(server.client, body, "k").json()


def test_pages_are_ordered(server):
    made = [submit(server.client).id for _ in range(3)]
    first = server.client.get("/v1/jobs?limit=2").json()
    rest = server.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["items"] + rest["items"]] == made[::-1]


def test_a_running_job_is_asked_to_stop(server):
    job = submit(server.client)
    claim(server, job)
    assert server.client.post(f"/v1/jobs/{job.id}/cancel").json()["status"] == "cancelling"


def test_text_that_postgresql_cannot_hold_is_no_failure_of_the_server(server):
    expect_problem(server.client.get("/v1/jobs/%00"), 404, "job_not_found", "job_id")
    job = submit(server.client, metadata={"a": "nul \x00"})
    assert server.client.get(f"/v1/jobs/{job.id}").json()["metadata"] == {"a": "nul \x00"}
