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
