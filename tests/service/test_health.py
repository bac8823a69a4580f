"""`/v1/health` says that the process lives, `/v1/ready` which of its parts answer."""

from datetime import UTC, datetime

import pytest
from tests.state.servers import RedisServer

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import Health, Readiness, WorkerView
from curvature_state.jobs import NewJob, create_job
from curvature_state.turns import Claimant, claim_next
from curvature_state.workers import publish_worker, set_draining

pytestmark = pytest.mark.integration


def publish(server):
    view = WorkerView(id="w1", device="cpu", engine_version="1", isolation="landlock", seen_at=datetime.now(UTC))
    publish_worker(server.resources.database, view, Catalogue(engine_version="1", extensions=(), losses=()))


def readiness(server, status):
    reply = server.client.get("/v1/ready")
    assert reply.status_code == status
    return Readiness.model_validate_json(reply.content)


def test_health_names_workers_isolation_and_limits(server):
    publish(server)
    health = Health.model_validate_json(server.client.get("/v1/health").content)
    assert [(w.id, w.isolation) for w in health.workers] == [("w1", "landlock")]
    assert health.limits["inline_batch_bytes"] == 4 * 2**20


def test_health_says_what_workers_are_called_offer_and_do(server):
    database = server.resources.database
    view = WorkerView(
        id="w1",
        name="gpu-1",
        memory_bytes=2**34,
        tags=("large",),
        device="cuda:0",
        engine_version="1",
        isolation="none",
        seen_at=datetime.now(UTC),
    )
    publish_worker(database, view, Catalogue(engine_version="1", extensions=(), losses=()))
    job = create_job(database, NewJob({}, "d")).job
    claim_next(database, Claimant("w1"), 60)
    set_draining(database, "gpu-1", True)
    (worker,) = server.client.get("/v1/health").json()["workers"]
    told = {name: worker[name] for name in ("name", "memory_bytes", "tags", "job", "draining")}
    assert told == {"name": "gpu-1", "memory_bytes": 2**34, "tags": ["large"], "job": job.id, "draining": True}


def test_ready_when_everything_answers(server):
    publish(server)
    assert readiness(server, 200).ready


def test_without_a_worker_it_is_not_ready(server):
    checks = readiness(server, 503).checks
    assert "start one with `curvature worker`" in checks.pop("worker")
    assert set(checks.values()) == {"ok"}


def test_without_a_broker_it_is_not_ready_and_ready_again_when_that_is_back(serve):
    broker = RedisServer()
    broker.start()
    server = serve(redis_url=broker.url)
    publish(server)
    try:
        assert readiness(server, 200).ready
        broker.stop()
        checks = readiness(server, 503).checks
        assert checks.pop("broker") != "ok"
        assert set(checks.values()) == {"ok"}
        broker.start()
        assert readiness(server, 200).ready
    finally:
        broker.close()


def test_a_broker_that_hangs_counts_as_away(serve):
    broker = RedisServer()
    broker.start()
    server = serve(redis_url=broker.url)
    try:
        broker.suspend()
        assert "imeout" in readiness(server, 503).checks["broker"]
    finally:
        broker.resume()
        broker.close()


def test_without_a_database_it_lives_but_is_not_ready(serve):
    server = serve(database_url="postgresql://nobody@127.0.0.1:1/none")
    assert server.client.get("/v1/health").json()["workers"] == []
    checks = readiness(server, 503).checks
    assert "connection" in checks["database"]
    assert "database" in checks["worker"]
    assert checks["broker"] == checks["storage"] == "ok"


def test_without_tables_it_says_how_to_make_them(serve, tmp_path):
    server = serve(database_url=f"sqlite:///{tmp_path / 'empty.db'}")
    assert server.client.get("/v1/health").status_code == 200
    assert "curvature admin migrate" in readiness(server, 503).checks["database"]


def test_without_its_folder_it_is_not_ready(serve):
    server = serve()
    publish(server)
    server.folder.rmdir()
    assert "is gone" in readiness(server, 503).checks["storage"]


def test_a_load_balancer_may_leave_workers_out(server):
    readiness(server, 503)
    reply = server.client.get("/v1/ready", params={"worker": "false"})
    assert reply.status_code == 200
    assert set(reply.json()["checks"]) == {"database", "storage", "broker"}


def test_a_broker_that_may_throw_bells_away_is_not_ready(server):
    publish(server)
    redis = server.resources.redis
    redis.config_set("maxmemory", "100mb")
    redis.config_set("maxmemory-policy", "volatile-lru")
    try:
        assert "set it to noeviction" in readiness(server, 503).checks["broker"]
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("maxmemory", "0")
    readiness(server, 200)
