"""API keys: who needs one, whose request it is, and what one tenant sees of another's."""

import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import event, text
from tests.service.planting import BATCH, MODEL, expect_problem, request_body, sha256, submit, upload
from tests.service.server import LiveServer, settings_in

from curvature_service.authentication import KNOWN_SECONDS
from curvature_state import keys, tenant_settings
from curvature_state.jobs import get_job

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
            url = path.format_map(defaultdict(lambda: "0" * 64))
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


# Keys of the table


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def as_tenant(server, tenant):
    """A client with a new key of the tenant."""
    _, key = keys.create_key(server.resources.database, tenant, "test")
    return httpx.Client(base_url=server.url, trust_env=False, timeout=30, headers=bearer(key))


@pytest.fixture
def lab(server):
    with as_tenant(server, "lab") as client:
        yield client


def tenant_of(server, job_id):
    return [t for t in ("default", "lab") if get_job(server.resources.database, job_id, t) is not None]


def test_a_keys_jobs_are_its_tenants(server, lab):
    assert tenant_of(server, submit(lab).id) == ["lab"]
    assert tenant_of(server, submit(server.client).id) == ["default"]


def test_a_key_opens_a_server_that_has_a_configured_one_too(locked):
    with as_tenant(locked, "lab") as client:
        assert tenant_of(locked, submit(client).id) == ["lab"]
    owner = httpx.Client(base_url=locked.url, trust_env=False, headers=bearer("secret"))
    with owner:
        assert tenant_of(locked, submit(owner).id) == ["default"]


def test_where_a_key_is_required_none_is_refused(serve):
    server = serve(require_key=True)
    problem = expect_problem(server.client.get("/v1/jobs"), 401, "unauthenticated")
    assert problem["detail"] == "this server needs an API key; none came"
    assert "curvature admin keys create" in problem["remedy"]
    with as_tenant(server, "lab") as client:
        assert client.get("/v1/jobs").status_code == 200
    assert server.client.get("/v1/health").status_code == 200


def test_the_environment_says_whether_a_key_is_required(make_settings, monkeypatch):
    monkeypatch.setenv("CURVATURE_REQUIRE_KEY", "true")
    assert make_settings().require_key is True


@pytest.mark.parametrize("key", ["wrong", "cv_", f"cv_{'0' * 12}_{'0' * 48}", f"cv_{'0' * 12}_{'0' * 48}x"])
def test_a_wrong_key_is_refused_where_none_is_needed(client, key):
    problem = expect_problem(client.get("/v1/jobs", headers=bearer(key)), 401, "unauthenticated")
    assert "is not known to this server" in problem["detail"]
    assert "0" * 48 not in problem["detail"]


def test_what_belongs_to_another_scheme_is_no_key_of_ours(client):
    assert client.get("/v1/jobs", headers={"Authorization": "Basic c2VjcmV0"}).status_code == 200


def test_a_key_revoked_before_its_first_use_is_refused_and_named(server):
    made, key = keys.create_key(server.resources.database, "lab", "a")
    keys.revoke_key(server.resources.database, made.id)
    problem = expect_problem(server.client.get("/v1/jobs", headers=bearer(key)), 401, "unauthenticated")
    assert problem["detail"] == f"the API key cv_{made.id}… was revoked"


def test_a_key_in_use_is_refused_soon_after_it_was_revoked(server, lab):
    assert lab.get("/v1/jobs").status_code == 200
    (made,) = keys.list_keys(server.resources.database)
    keys.revoke_key(server.resources.database, made.id)
    deadline = time.monotonic() + 5
    while lab.get("/v1/jobs").status_code == 200:
        assert time.monotonic() < deadline, "the revoked key still opens"


def test_many_requests_ask_the_database_for_the_key_once(server, lab):
    asked = []

    def note(connection, cursor, statement, parameters, context, many):
        if "FROM api_keys" in statement:
            asked.append(statement)

    engine = server.resources.database._engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        until = time.monotonic() + KNOWN_SECONDS / 2
        for _ in range(50):
            assert lab.get("/v1/extensions").status_code == 200
        in_time = time.monotonic() < until
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len(asked) == 1 or not in_time


def test_a_keys_use_is_noted(server, lab):
    lab.get("/v1/jobs")
    (made,) = keys.list_keys(server.resources.database)
    assert datetime.now(UTC) - made.used_at < timedelta(seconds=30)


# One tenant and another's jobs


def test_anothers_job_is_as_unknown_as_none(server, lab):
    job = submit(server.client)
    unknown = "0" * 32
    for verb, path in (
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}?wait=1"),
        ("POST", "/v1/jobs/{}/cancel"),
        ("POST", "/v1/jobs/{}/retry"),
        ("GET", "/v1/jobs/{}/events"),
        ("GET", "/v1/jobs/{}/result"),
        ("GET", "/v1/jobs/{}/result/variance.safetensors"),
        ("GET", "/v1/plans/{}"),
    ):
        theirs = expect_problem(lab.request(verb, path.format(job.id)), 404, "job_not_found", "job_id")
        none = expect_problem(lab.request(verb, path.format(unknown)), 404, "job_not_found", "job_id")
        assert theirs["detail"].replace(job.id, unknown) == none["detail"]
    assert server.client.get(f"/v1/jobs/{job.id}").json()["status"] == "queued"


def test_every_path_of_a_job_is_one_tenants(server, lab):
    """Whatever paths there are: of another tenant's job, none answers."""
    job = submit(server.client)
    tried = 0
    for path, verbs in server.app.openapi()["paths"].items():
        for verb in verbs:
            if "{job_id}" not in path:
                continue
            url = path.format(job_id=job.id, label="variance", attempt=1, name="variance.safetensors")
            assert lab.request(verb, url).status_code == 404, (verb, path)
            tried += 1
    assert tried >= 8


def test_every_path_of_a_sweep_is_one_tenants(server, lab):
    body = {"base": request_body(server.client), "grid": {"seed": [{"value": 1}]}}
    mine, theirs = (c.post("/v1/sweeps", json=body).json()["id"] for c in (lab, server.client))
    tried = 0
    for path, verbs in server.app.openapi()["paths"].items():
        for verb in verbs:
            if "{sweep_id}" in path:
                expect_problem(lab.request(verb, path.format(sweep_id=theirs)), 404, "sweep_not_found", "sweep_id")
                tried += 1
    assert tried >= 6
    assert [sweep["id"] for sweep in lab.get("/v1/sweeps").json()["items"]] == [mine]
    assert server.client.get(f"/v1/sweeps/{theirs}").json()["counts"] == {"queued": 1}


def test_a_list_shows_ones_own(server, lab):
    mine, theirs = submit(lab), submit(server.client)
    assert [job["id"] for job in lab.get("/v1/jobs").json()["items"]] == [mine.id]
    assert [job["id"] for job in server.client.get("/v1/jobs").json()["items"]] == [theirs.id]


def test_a_cursor_leads_to_ones_own_jobs_only(server, lab):
    mine = [submit(lab, seed=seed).id for seed in range(3)]
    submit(server.client)
    cursor = server.client.get("/v1/jobs?limit=1").json()["next_cursor"]
    assert cursor is None
    first = lab.get("/v1/jobs?limit=2").json()
    assert [job["id"] for job in first["items"]] == mine[:0:-1]
    assert [j["id"] for j in lab.get("/v1/jobs", params={"cursor": first["next_cursor"]}).json()["items"]] == mine[:1]
    assert server.client.get("/v1/jobs", params={"cursor": first["next_cursor"]}).json()["items"] == []


def test_an_idempotency_key_serves_one_tenant(server, lab):
    body, header = request_body(lab), {"Idempotency-Key": "same"}
    first, second = (c.post("/v1/jobs", json=body, headers=header) for c in (lab, server.client))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    assert lab.post("/v1/jobs", json=body, headers=header).json()["id"] == first.json()["id"]


def test_plans_and_inspections_are_made_for_who_asks(server, lab):
    plan = lab.post("/v1/plans", json=request_body(lab)).json()
    assert tenant_of(server, plan["id"]) == ["lab"]
    inspections = [c.get(f"/v1/models/{sha256(MODEL)}?wait=0").json()["inspection_job"] for c in (lab, server.client)]
    assert [tenant_of(server, job) for job in inspections] == [["lab"], ["default"]]
    assert lab.get(f"/v1/models/{sha256(MODEL)}?wait=0").json()["inspection_job"] == inspections[0]


def test_uploads_are_known_by_their_content_whoever_sent_them(server, lab):
    upload(server.client)
    upload(lab, "batches", BATCH)
    assert lab.head(f"/v1/models/{sha256(MODEL)}").status_code == 200
    assert server.client.get(f"/v1/batches/{sha256(BATCH)}/content").content == BATCH


# A tenant's limit


def test_a_full_queue_is_refused_with_the_numbers_and_when_to_come_again(server, lab):
    tenant_settings.set_tenant(server.resources.database, "lab", max_queued=2)
    submit(lab)
    submit(lab)
    reply = lab.post("/v1/jobs", json=request_body(lab))
    problem = expect_problem(reply, 429, "queue_full")
    assert problem["detail"] == "tenant lab may have 2 queued jobs; 2 are queued and 1 came"
    assert int(reply.headers["retry-after"]) > 0
    assert len(lab.get("/v1/jobs").json()["items"]) == 2
    submit(server.client)


def test_what_never_fits_is_not_to_be_tried_again(server, lab):
    tenant_settings.set_tenant(server.resources.database, "lab", max_queued=0)
    reply = lab.post("/v1/jobs", json=request_body(lab))
    assert "submit at most 0 at once" in expect_problem(reply, 429, "queue_full")["remedy"]
    assert "retry-after" not in reply.headers


def test_while_the_database_is_away_a_key_is_neither_right_nor_wrong(serve, tmp_path):
    server = serve(require_key=True)
    with as_tenant(server, "lab") as client:
        with server.resources.database.write() as session:
            session.execute(text("ALTER TABLE api_keys RENAME TO hidden"))
        expect_problem(client.get("/v1/jobs"), 503, "unavailable")
