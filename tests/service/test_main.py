"""`python -m curvature_service`: the API process."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

pytestmark = pytest.mark.integration


def start(tmp_path, *options, **settings):
    environment = {
        **os.environ,
        "CURVATURE_DATABASE_URL": f"sqlite:///{tmp_path / 'curvature.db'}",
        "CURVATURE_STORAGE_URL": (tmp_path / "objects").as_uri(),
        "CURVATURE_REDIS_URL": f"unix://{tmp_path}/none.sock",
        **settings,
    }
    command = [sys.executable, "-m", "curvature_service", "--port", "0", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def await_url(process):
    for line in process.stderr:
        if "Uvicorn running on" in line:
            return line.split("running on ")[1].split()[0]
    raise RuntimeError("the API did not start")


def test_it_migrates_serves_and_stops_in_order(tmp_path):
    process = start(tmp_path, "--migrate")
    url = await_url(process)
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/v1/jobs").json() == {"items": [], "next_cursor": None}
        assert client.get("/v1/ready").json()["checks"]["database"] == "ok"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in errors


def test_a_database_that_is_away_is_told_in_a_line(tmp_path):
    process = start(tmp_path, "--migrate", CURVATURE_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "curvature_service: the database's tables cannot be brought up to date" in errors
    assert "Traceback" not in errors


def test_a_broker_that_may_throw_bells_away_is_told_in_a_line(tmp_path, redis_server):
    with redis_server.connect() as connection:
        connection.config_set("maxmemory", "100mb")
        connection.config_set("maxmemory-policy", "allkeys-lru")
        try:
            process = start(tmp_path, CURVATURE_REDIS_URL=redis_server.url)
            _, errors = process.communicate(timeout=20)
        finally:
            connection.config_set("maxmemory-policy", "noeviction")
            connection.config_set("maxmemory", "0")
    assert process.returncode == 1
    assert "curvature_service: the broker's maxmemory-policy is allkeys-lru" in errors
    assert "Traceback" not in errors


def test_a_store_that_does_not_fit_is_told_in_a_line(tmp_path):
    store = {"CURVATURE_STORAGE_URL": "s3://bucket/prefix", "AWS_ENDPOINT_URL": "http://store.example"}
    process = start(tmp_path, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", **store)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "check CURVATURE_STORAGE_URL" in errors
    assert "AWS_ALLOW_HTTP" in errors
    assert "Traceback" not in errors
