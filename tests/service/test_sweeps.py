"""Sweeps over HTTP: accepted whole or refused with the place at fault, looked at, followed, stopped, taken up again."""

import json
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from httpx_sse import connect_sse
from sqlalchemy import select, update
from tests.service import planting
from tests.service.planting import BATCH, MODEL, expect_problem, sha256, upload
from tests.service.test_jobs import ABSENT, bells
from tests.state.servers import RedisServer

from curvature_protocol.health import WorkerView
from curvature_protocol.sweeps import MOST_ROWS, Sweep
from curvature_service.extensions.service import built_in_catalogue
from curvature_service.sweeps import submission
from curvature_state import events, jobs
from curvature_state.tables import TenantRow, WebhookRow
from curvature_state.workers import publish_worker

pytestmark = pytest.mark.integration

OTHER = b"the bytes of another model"


@pytest.fixture
def base(client):
    """What the rows share; model and batches are there."""
    upload(client, "models", OTHER)
    return {
        "model": upload(client),
        "batch": {"sha256": upload(client, "batches", BATCH)},
        "extensions": ["variance"],
        "loss": "mse",
    }


def axis(*values):
    return [{"value": value} for value in values]


def post(client, body, key=None):
    return client.post("/v1/sweeps", json=body, headers={} if key is None else {"Idempotency-Key": key})


def seeds(client, base, count):
    reply = post(client, {"base": base, "grid": {"seed": axis(*range(count))}})
    assert reply.status_code == 201, reply.text
    return Sweep.model_validate_json(reply.content)


def rows_of(client, sweep, **params):
    return client.get(f"/v1/sweeps/{sweep.id}/rows", params={"limit": 1000, **params}).json()["items"]


def end(server, row, how=planting.succeed, publish=True):
    """End a row's job as a worker would."""
    how(server, SimpleNamespace(id=row["job_id"]))
    if publish:
        job = jobs.get_job(server.resources.database, row["job_id"])
        events.publish(server.resources.redis, events.state_event(job))


def look(client, sweep):
    return client.get(f"/v1/sweeps/{sweep.id}").json()


# Submission


def test_a_grid_is_every_combination_the_last_axis_fastest(client, base):
    grid = {"model": [*axis(sha256(MODEL)), {"value": sha256(OTHER), "name": "other"}], "seed": axis(3, 5)}
    reply = post(client, {"base": base, "grid": grid, "metadata": {"run": "7"}})
    sweep = Sweep.model_validate_json(reply.content)
    assert reply.status_code == 201
    assert (sweep.total, sweep.counts, sweep.axes, sweep.metadata) == (
        4,
        {"queued": 4},
        ("model", "seed"),
        {"run": "7"},
    )
    assert [(row["row"], row["coordinates"]) for row in rows_of(client, sweep)] == [
        (0, {"model": sha256(MODEL), "seed": 3}),
        (1, {"model": sha256(MODEL), "seed": 5}),
        (2, {"model": "other", "seed": 3}),
        (3, {"model": "other", "seed": 5}),
    ]


def test_a_row_is_the_job_that_it_would_be_alone(client, base):
    own = {
        "extensions": [{"name": "kfac", "label": "k"}],
        "priority": 7,
        "metadata": {"a": "b"},
        "requires": {"tag": "x"},
    }
    alone = client.post("/v1/jobs", json={**base, **own}).json()
    sweep = Sweep.model_validate_json(post(client, {"base": base, "rows": [{"fields": own}]}).content)
    (row,) = rows_of(client, sweep)
    job = client.get(f"/v1/jobs/{row['job_id']}").json()
    different = {name for name in job if job[name] != alone[name]}
    assert different == {"id", "created_at", "sweep", "coordinates"}
    assert (job["sweep"], job["coordinates"]) == (sweep.id, {"priority": 7})


def test_unnamed_values_are_known_by_what_tells_them_apart(client, base):
    grid = {
        "batch": axis({"sha256": sha256(BATCH)}),
        "loss": axis("mse", {"name": "huber", "options": {"delta": 2.0}}),
        "extensions": axis(["variance"], ["grad", "kfac"]),
    }
    sweep = Sweep.model_validate_json(post(client, {"base": base, "grid": grid}).content)
    assert [row["coordinates"] for row in rows_of(client, sweep)] == [
        {"batch": sha256(BATCH), "loss": loss, "extensions": place} for loss in ("mse", "huber") for place in (0, 1)
    ]


def test_fields_that_come_with_a_value_are_those_of_its_rows(client, base):
    grid = {
        "model": [{"value": sha256(MODEL), "fields": {"warnings": ["it was traced"], "seed": 4}}, *axis(sha256(OTHER))]
    }
    sweep = Sweep.model_validate_json(post(client, {"base": base, "grid": grid}).content)
    requests = [client.get(f"/v1/jobs/{row['job_id']}").json()["request"] for row in rows_of(client, sweep)]
    assert [(request["warnings"], request["seed"]) for request in requests] == [(["it was traced"], 4), ([], 0)]


def test_rows_have_the_coordinates_given_to_them(client, base):
    rows = [{"fields": {"seed": 1}, "coordinates": {"who": "a"}}, {"fields": {"seed": 2}}]
    sweep = Sweep.model_validate_json(post(client, {"base": base, "rows": rows}).content)
    assert sweep.axes == ("who", "seed")
    assert [row["coordinates"] for row in rows_of(client, sweep)] == [{"who": "a"}, {"seed": 2}]


def test_the_bell_is_rung_once_not_once_per_row(client, base, redis_server):
    sweep = seeds(client, base, 20)
    assert bells(redis_server) == [rows_of(client, sweep)[0]["job_id"]]


def test_as_many_workers_are_woken_as_there_is_work_for(server, base, redis_server):
    now = datetime.now(UTC)
    for name in ("a", "b", "c"):
        worker = WorkerView(id=name, device="cpu", engine_version="1", isolation="none", seen_at=now)
        publish_worker(server.resources.database, worker, built_in_catalogue())
    seeds(server.client, base, 2)
    assert len(bells(redis_server)) == 2
    seeds(server.client, base, 20)
    assert len(bells(redis_server)) == 2 + 3


def test_rows_over_data_sets_have_shards(client, base, redis_server):
    more = upload(client, "batches", b"another batch")
    parts = [{"sha256": sha256(BATCH), "samples": 4}, {"sha256": more, "samples": 2}]
    grid = {"batch": [{"value": {"parts": parts}, "name": "all"}, {"value": base["batch"], "name": "one"}]}
    sweep = Sweep.model_validate_json(post(client, {"base": base, "grid": grid}).content)
    assert sweep.counts == {"waiting": 1, "queued": 1}
    whole = client.get(f"/v1/jobs/{rows_of(client, sweep)[0]['job_id']}").json()
    assert (whole["parts"], whole["progress"]["total"]) == (2, 2)
    shards = client.get("/v1/jobs", params={"kind": "shard"}).json()["items"]
    assert [(s["parent"], s["sweep"], s["request"]["part"]["first_sample"]) for s in reversed(shards)] == [
        (whole["id"], None, 0),
        (whole["id"], None, 4),
    ]
    assert bells(redis_server) == [shards[-1]["id"]]


def test_a_sweep_is_accepted_while_the_broker_is_away(serve):
    broker = RedisServer()
    server = serve(redis_url=broker.url)
    body = {"base": planting.request_body(server.client), "grid": {"seed": axis(1, 2)}}
    assert post(server.client, body).status_code == 201
    broker.close()


def test_ten_thousand_rows_are_accepted_within_seconds(client, base):
    body = {"base": base, "grid": {"model": axis(sha256(MODEL), sha256(OTHER)), "seed": axis(*range(5000))}}
    begun = time.process_time()  # of the server, too, which runs in this process
    reply = post(client, body)
    assert time.process_time() - begun < 5.0
    assert reply.json()["counts"] == {"queued": 10_000}


def test_ten_thousand_explicit_rows_are_accepted_within_seconds(client, base):
    rows = [{"fields": {**base, "seed": seed}, "coordinates": {"seed": seed}} for seed in range(10_000)]
    begun = time.process_time()
    reply = post(client, {"rows": rows})
    assert time.process_time() - begun < 5.0
    assert reply.json()["counts"] == {"queued": 10_000}


# Refusals

MISTAKES = [
    ({"grid": {"sede": axis(1)}}, "invalid_request", "grid.sede", "did you mean 'seed'"),
    ({"base": {"x": 1}, "grid": {"seed": axis(1)}}, "invalid_request", "base.x", "no field 'x'"),
    ({"rows": [{"fields": {}}, {"fields": {"lss": "mse"}}]}, "invalid_request", "rows.1.lss", "did you mean 'loss'"),
    (
        {"base": {"webhook": {"url": "http://a"}}, "grid": {"seed": axis(1)}},
        "invalid_request",
        "base.webhook",
        "one webhook",
    ),
    ({"grid": {"seed": axis(1, 2, "x")}}, "invalid_request", "grid.seed.2", "valid integer"),
    ({"grid": {"seed": axis(1, -2)}}, "invalid_request", "grid.seed.1", "greater than or equal to 0"),
    (
        {"rows": [{"fields": {}}, {"fields": {"reduction": "none"}}]},
        "invalid_request",
        "rows.1.reduction",
        "'mean' or 'sum'",
    ),
    (
        {"base": {"priority": 11}, "grid": {"seed": axis(1)}},
        "invalid_request",
        "base.priority",
        "less than or equal to 9",
    ),
    ({"grid": {"loss": axis("mse", "nonsense")}}, "unknown_loss", "grid.loss.1.name", "nonsense"),
    ({"grid": {"extensions": axis(["grad", "kfacs"])}}, "unknown_extension", "grid.extensions.0.1.name", "'kfac'"),
    (
        {"rows": [{"fields": {"extensions": [{"name": "kfac", "options": {"mc_samples": 0}}]}}]},
        "invalid_option",
        "rows.0.extensions.0.options.mc_samples",
        "mc_samples",
    ),
    (
        {"grid": {"extensions": axis(["grad", "grad"])}},
        "invalid_request",
        "grid.extensions.0",
        "labels must be distinct",
    ),
    ({"grid": {"batch": axis({"data": "AAAA"})}}, "invalid_request", "grid.batch.0", "by their hash"),
    ({"grid": {"model": [{"value": "a" * 64, "fields": {"y": 1}}]}}, "invalid_request", "grid.model.0.fields.y", "'y'"),
    ({"grid": {"seed": []}}, "invalid_request", "grid.seed", "at least 1 item"),
    ({"grid": {}}, "invalid_request", "grid", "at least 1 item"),
    ({"rows": []}, "invalid_request", "rows", "at least 1 item"),
    ({}, "invalid_request", None, "either a grid or rows"),
    ({"grid": {"seed": axis(1)}, "rows": [{"fields": {}}]}, "invalid_request", None, "either a grid or rows"),
    ({"rows": [{"fields": {}, "x": 1}]}, "invalid_request", "rows.0.x", "Extra inputs"),
]


@pytest.mark.parametrize(("body", "code", "param", "words"), MISTAKES)
def test_a_mistake_is_told_with_its_place_and_nothing_is_written(client, base, body, code, param, words):
    reply = post(client, {**body, "base": {**base, **body.get("base", {})}})
    assert words in expect_problem(reply, 422, code, param)["detail"]
    assert client.get("/v1/sweeps").json()["items"] == []
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"grid": {"model": axis(sha256(MODEL), ABSENT)}}, "model_not_found", "grid.model.1"),
        ({"base": {"batch": {"sha256": ABSENT}}, "grid": {"seed": axis(1, 2)}}, "batch_not_found", "base.batch"),
        ({"rows": [{"fields": {}}, {"fields": {"loss": {"sha256": ABSENT}}}]}, "loss_not_found", "rows.1.loss"),
        (
            {
                "grid": {
                    "batch": axis(
                        {"parts": [{"sha256": sha256(BATCH), "samples": 1}, {"sha256": ABSENT, "samples": 1}]}
                    )
                }
            },
            "batch_not_found",
            "grid.batch.0.parts.1",
        ),
        (
            {
                "base": {"extensions": [{"name": "batch_dot", "options": {"against": {"sha256": ABSENT}}}]},
                "rows": [{"fields": {}}],
            },
            "batch_not_found",
            "base.extensions.0.options.against",
        ),
    ],
)
def test_an_upload_that_is_missing_is_named_with_its_place(client, base, body, code, param):
    reply = post(client, {**body, "base": {**base, **body.get("base", {})}})
    assert ABSENT in expect_problem(reply, 404, code, param)["detail"]


@pytest.mark.parametrize("name", ["model", "batch", "extensions"])
def test_what_every_row_needs_is_missed(client, base, name):
    rest = {key: value for key, value in base.items() if key != name}
    for body, where in (
        ({"grid": {"seed": axis(1)}}, "grid"),
        ({"rows": [{"fields": {name: base[name]}}, {"fields": {}}]}, "rows.1"),
    ):
        reply = post(client, {"base": rest, **body})
        assert repr(name) in expect_problem(reply, 422, "invalid_request", where)["detail"]


def test_a_quantity_of_the_whole_batch_is_refused_for_a_data_set_alone(client, base):
    whole = {"parts": [{"sha256": sha256(BATCH), "samples": 4}]}
    grid = {"batch": axis(base["batch"], whole), "extensions": axis(["variance"], ["grad", "batch_dot"])}
    reply = post(client, {"base": base, "grid": grid})
    expect_problem(reply, 422, "whole_batch_required", "grid.extensions.1.1.name")
    grid["batch"] = axis(base["batch"])
    assert post(client, {"base": base, "grid": grid}).status_code == 201


def test_a_grid_with_too_many_rows_is_refused(client, base):
    grid = {"seed": axis(*range(1001)), "priority": axis(*range(10)), "reduction": axis(*["mean"] * 10)}
    detail = expect_problem(post(client, {"base": base, "grid": grid}), 422, "invalid_request", "grid")["detail"]
    assert detail == f"a sweep may have {MOST_ROWS} rows; the grid has 1001 × 10 × 10 = 100100"


def test_coordinates_that_no_two_rows_share_are_refused(client, base):
    rows = [{"fields": {}, "coordinates": {f"seed {seed}": seed}} for seed in range(65)]
    assert "65" in expect_problem(post(client, {"base": base, "rows": rows}), 422, "invalid_request", "rows")["detail"]


def test_a_row_whose_request_is_too_long_is_refused(client, base):
    reply = post(client, {"base": base, "grid": {"metadata": axis({}, {"a": "x" * 300_000})}})
    expect_problem(reply, 413, "payload_too_large", "grid.metadata.1")


def test_a_short_body_cannot_become_endless_rows(client, base, monkeypatch):
    monkeypatch.setattr(submission, "MOST_STORED_BYTES", 1_000_000)
    body = {"base": {**base, "metadata": {"a": "x" * 100_000}}, "grid": {"seed": axis(*range(100))}}
    detail = expect_problem(post(client, body), 413, "payload_too_large")["detail"]
    assert detail == "a sweep may have 1000000 bytes in the requests of all its rows; there are more from row 9 on"
    assert client.get("/v1/jobs").json()["items"] == []


def test_shards_count_against_the_limit_of_jobs(client, base, monkeypatch):
    monkeypatch.setattr(submission, "MOST_JOBS", 10)
    parts = {"parts": [{"sha256": sha256(BATCH), "samples": 1}] * 4}
    body = {"base": {**base, "batch": parts}, "grid": {"seed": axis(1, 2, 3)}}
    assert "from row 2 on" in expect_problem(post(client, body), 413, "payload_too_large")["detail"]


def test_a_full_queue_takes_no_row(server, base):
    seeds(server.client, base, 2)
    with server.resources.database.write() as session:
        session.execute(update(TenantRow).values(max_queued=4))
    reply = post(server.client, {"base": base, "grid": {"seed": axis(1, 2, 3)}})
    assert "2 are queued and 3 came" in expect_problem(reply, 429, "queue_full")["detail"]
    assert reply.headers["retry-after"]
    assert len(server.client.get("/v1/sweeps").json()["items"]) == 1


def test_a_webhook_waits_for_the_end_of_all_rows(serve):
    server = serve(webhook_allow_private=True)
    hook = {"url": "http://127.0.0.1:9/hook", "secret": "the-secret-of-this-sweep"}
    body = {"base": planting.request_body(server.client), "grid": {"seed": axis(1, 2)}, "webhook": hook}
    reply = post(server.client, body)
    assert reply.status_code == 201
    assert "secret" not in reply.text
    with server.resources.database.read() as session:
        (row,) = session.scalars(select(WebhookRow))
    assert (row.subject, row.subject_id, row.url) == ("sweep", reply.json()["id"], hook["url"])


def test_a_webhook_that_may_not_be_sent_refuses_the_sweep(client, base):
    hook = {"url": "http://127.0.0.1/hook"}
    reply = post(client, {"base": base, "grid": {"seed": axis(1)}, "webhook": hook})
    expect_problem(reply, 422, "invalid_request", "webhook.url")
    assert client.get("/v1/sweeps").json()["items"] == []


# Idempotency


def test_the_same_key_and_body_give_the_same_sweep(client, base, redis_server):
    body = {"base": base, "grid": {"seed": axis(1, 2)}}
    first, again = post(client, body, "k"), post(client, body, "k")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert len(bells(redis_server)) == 1


def test_the_same_key_with_another_body_is_refused(client, base):
    first = post(client, {"base": base, "grid": {"seed": axis(1, 2)}}, "k").json()["id"]
    reply = post(client, {"base": base, "grid": {"seed": axis(1, 3)}}, "k")
    assert first in expect_problem(reply, 409, "idempotency_conflict", "Idempotency-Key")["detail"]


# Looking


@pytest.mark.parametrize("path", ["", "/rows", "/states", "/events"])
@pytest.mark.parametrize("sweep_id", ["0" * 32, "nothing", "%00"])
def test_a_sweep_that_does_not_exist(client, sweep_id, path):
    expect_problem(client.get(f"/v1/sweeps/{sweep_id}{path}"), 404, "sweep_not_found", "sweep_id")


def test_sweeps_are_listed_newest_first(client, base):
    made = [seeds(client, base, 1 + n) for n in range(3)]
    first = client.get("/v1/sweeps?limit=2").json()
    rest = client.get("/v1/sweeps", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [sweep["id"] for sweep in first["items"] + rest["items"]] == [sweep.id for sweep in reversed(made)]
    assert rest["next_cursor"] is None
    assert first["items"][0]["counts"] == {"queued": 3}


def test_rows_come_in_pages(client, base):
    sweep = seeds(client, base, 5)
    first = client.get(f"/v1/sweeps/{sweep.id}/rows?limit=3").json()
    assert [row["row"] for row in first["items"]] == [0, 1, 2]
    rest = client.get(f"/v1/sweeps/{sweep.id}/rows", params={"limit": 3, "first": first["next_row"]}).json()
    assert ([row["row"] for row in rest["items"]], rest["next_row"]) == ([3, 4], None)


def test_rows_tell_what_became_of_them(server, base):
    sweep = seeds(server.client, base, 4)
    rows = rows_of(server.client, sweep)
    end(server, rows[0])
    end(server, rows[1], planting.fail)
    planting.claim(server, SimpleNamespace(id=rows[2]["job_id"]))
    states = server.client.get(f"/v1/sweeps/{sweep.id}/states").json()["states"]
    assert states == "sfrq"
    assert look(server.client, sweep)["counts"] == {"succeeded": 1, "failed": 1, "running": 1, "queued": 1}
    failed = rows_of(server.client, sweep, status="failed")
    assert [(row["row"], row["error"]["code"], row["error"]["remedy"]) for row in failed] == [
        (1, "empty_batch", "send some samples")
    ]
    shown = rows_of(server.client, sweep, results=True)
    assert [row["result"] and row["result"]["loss"] for row in shown] == [0.5, None, None, None]
    assert shown[0]["created_at"] <= shown[0]["started_at"] <= shown[0]["finished_at"]


def test_a_removed_result_is_a_row_without_one(server, base):
    sweep = seeds(server.client, base, 1)
    (row,) = rows_of(server.client, sweep)
    end(server, row)
    for key in server.stored():
        if key.startswith("results/"):
            server.resources.objects.delete(key)
    assert rows_of(server.client, sweep, results=True)[0]["result"] is None


# Waiting


def in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return lambda: (thread.join(), found[0])[1]


@pytest.mark.parametrize("publish", [True, False])
def test_a_wait_ends_with_the_last_job(server, base, publish):
    sweep = seeds(server.client, base, 2)
    rows = rows_of(server.client, sweep)
    waiting = in_thread(lambda: server.client.get(f"/v1/sweeps/{sweep.id}?wait=20"))
    end(server, rows[0], publish=publish)
    end(server, rows[1], planting.fail, publish=publish)
    begun = time.monotonic()
    reply = waiting().json()
    assert (reply["done"], reply["counts"]) == (True, {"succeeded": 1, "failed": 1})
    assert time.monotonic() - begun < 5


def test_a_wait_that_is_too_short_shows_where_it_stands(client, base):
    sweep = seeds(client, base, 2)
    assert client.get(f"/v1/sweeps/{sweep.id}?wait=0.2").json()["done"] is False


@pytest.mark.parametrize("publish", [True, False])
def test_states_come_as_soon_as_another_row_is_over(server, base, publish):
    sweep = seeds(server.client, base, 3)
    rows = rows_of(server.client, sweep)
    end(server, rows[1], publish=publish)
    assert server.client.get(f"/v1/sweeps/{sweep.id}/states?finished=0&wait=20").json()["states"] == "qsq"
    waiting = in_thread(lambda: server.client.get(f"/v1/sweeps/{sweep.id}/states?finished=1&wait=20"))
    end(server, rows[0], planting.fail, publish=publish)
    assert waiting().json()["states"] == "fsq"


def test_states_come_at_last_when_nothing_changes(client, base):
    sweep = seeds(client, base, 2)
    assert client.get(f"/v1/sweeps/{sweep.id}/states?finished=0&wait=0.2").json()["states"] == "qq"


# Events


def follow(client, sweep, after=None, **params):
    headers = {} if after is None else {"Last-Event-ID": after}
    with connect_sse(client, "GET", f"/v1/sweeps/{sweep.id}/events", headers=headers, params=params) as source:
        for sent in source.iter_sse():
            if sent.data:
                yield sent.id, sent.event, json.loads(sent.data)


def test_states_and_counts_come_as_they_happen(server, base):
    sweep = seeds(server.client, base, 2)
    rows = rows_of(server.client, sweep)
    stream = follow(server.client, sweep)
    assert next(stream)[1:] == ("counts", look(server.client, sweep))
    end(server, rows[0])
    _, name, event = next(stream)
    assert (name, event["job_id"], event["status"]) == ("state", rows[0]["job_id"], "succeeded")
    assert next(stream)[2]["counts"] == {"succeeded": 1, "queued": 1}
    end(server, rows[1], planting.fail)
    rest = list(stream)
    assert [event["error"]["code"] for _, name, event in rest if name == "state"] == ["empty_batch"]
    assert rest[-1][1:] == ("counts", look(server.client, sweep))
    assert rest[-1][2]["done"]


def test_a_follower_resumes_where_it_was(server, base):
    sweep = seeds(server.client, base, 3)
    rows = rows_of(server.client, sweep)
    for row in rows[:2]:
        end(server, row)
    seen = [event for event in follow(server.client, sweep, wait=0.1) if event[1] == "state"]
    assert [event["job_id"] for _, _, event in seen] == [rows[0]["job_id"], rows[1]["job_id"]]
    again = [event for event in follow(server.client, sweep, after=seen[0][0], wait=0.1) if event[1] == "state"]
    assert [event["job_id"] for _, _, event in again] == [rows[1]["job_id"]]


def test_a_follower_outlasts_the_loss_of_all_events(server, base, redis_server):
    sweep = seeds(server.client, base, 2)
    rows = rows_of(server.client, sweep)
    stream = follow(server.client, sweep)
    next(stream)
    with redis_server.connect() as connection:
        connection.flushall()
    end(server, rows[0], publish=False)  # the database alone knows
    assert next(stream)[2]["counts"] == {"succeeded": 1, "queued": 1}
    end(server, rows[1], publish=False)
    assert [(name, event["done"]) for _, name, event in stream] == [("counts", True)]


def test_a_sweep_that_is_over_is_told_and_the_stream_ends(server, base):
    sweep = seeds(server.client, base, 1)
    end(server, rows_of(server.client, sweep)[0])
    assert [name for _, name, _ in follow(server.client, sweep)] == ["state", "counts"]


def test_an_id_that_is_no_events_is_refused(client, base):
    reply = client.get(f"/v1/sweeps/{seeds(client, base, 1).id}/events", headers={"Last-Event-ID": "x"})
    expect_problem(reply, 422, "invalid_request", "Last-Event-ID")


# Cancelling, retrying


def test_cancelling_stops_all_that_is_not_over(server, base):
    sweep = seeds(server.client, base, 3)
    rows = rows_of(server.client, sweep)
    end(server, rows[0])
    planting.claim(server, SimpleNamespace(id=rows[1]["job_id"]))
    reply = server.client.post(f"/v1/sweeps/{sweep.id}/cancel")
    assert reply.json()["counts"] == {"succeeded": 1, "cancelling": 1, "cancelled": 1}
    assert server.client.post(f"/v1/sweeps/{sweep.id}/cancel").json() == reply.json()


def test_failed_and_cancelled_rows_are_queued_once_more(server, base, redis_server):
    sweep = seeds(server.client, base, 3)
    rows = rows_of(server.client, sweep)
    end(server, rows[0])
    end(server, rows[1], planting.fail)
    server.client.post(f"/v1/sweeps/{sweep.id}/cancel")
    with redis_server.connect() as connection:
        connection.flushall()
    reply = server.client.post(f"/v1/sweeps/{sweep.id}/retry")
    assert reply.json()["counts"] == {"succeeded": 1, "queued": 2}
    (rung,) = bells(redis_server)
    assert rung in {row["job_id"] for row in rows[1:]}


def test_a_retry_that_the_queue_has_no_room_for(server, base):
    sweep = seeds(server.client, base, 3)
    server.client.post(f"/v1/sweeps/{sweep.id}/cancel")
    with server.resources.database.write() as session:
        session.execute(update(TenantRow).values(max_queued=2))
    expect_problem(server.client.post(f"/v1/sweeps/{sweep.id}/retry"), 429, "queue_full")
    assert look(server.client, sweep)["counts"] == {"cancelled": 3}


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_a_sweep_that_does_not_exist_is_not_changed(client, verb):
    expect_problem(client.post(f"/v1/sweeps/{'0' * 32}/{verb}"), 404, "sweep_not_found", "sweep_id")
