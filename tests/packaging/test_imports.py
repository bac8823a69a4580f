"""Importing our packages brings in only what they may use, and does nothing else. Each runs in its own process."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

PACKAGES = [
    "curvature_client",
    "curvature_protocol",
    "curvature_service",
    "curvature_state",
    "curvature_worker",
    "curvature_engine",
]
DEPTH = dict.fromkeys(["curvature_protocol", "curvature_service", "curvature_state"], "deep")
WATCH = """
import importlib, json, os, pkgutil, sys

name, deep = sys.argv[1], sys.argv[2] == "deep"
folder = os.path.dirname(importlib.util.find_spec(name).origin) + os.sep
calls = ("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove", "os.system", "os.exec", "sqlite3.")
seen = []

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull
        data = isinstance(path, str) and path.startswith(folder) and not path.endswith((".py", ".pyc"))
        if writes or data:
            seen.append(f"open {path!r}")
    elif event.startswith(calls):
        seen.append(f"{event} {arguments!r}")

sys.addaudithook(watch)
package = importlib.import_module(name)
if deep:
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if ".migrations" not in module.name:  # Alembic runs those
            importlib.import_module(module.name)
print(json.dumps({"modules": sorted(sys.modules), "events": seen}))
"""


@cache
def import_alone(name, depth):
    """Import a package (`depth` "deep": and all its modules) in a fresh process; returns modules and events seen."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCH, name, depth]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def brought_in(report, roots):
    return {module.split(".")[0] for module in report["modules"]} & set(roots)


@pytest.mark.parametrize("package", DEPTH)
def test_no_module_of_the_service_brings_in_torch_or_the_engine(package):
    report = import_alone(package, "deep")
    assert not brought_in(report, {"torch", "curvature_engine", "curvature_worker", "curvature_client"})


def test_the_client_brings_in_neither_torch_nor_the_server():
    server = {"curvature_service", "curvature_state", "curvature_worker", "curvature_engine"}
    report = import_alone("curvature_client", "top")
    assert not brought_in(report, server | {"torch", "fastapi", "celery", "sqlalchemy", "redis"})


def test_the_engine_brings_in_no_web_no_queue_and_no_other_package_of_ours():
    others = set(PACKAGES) - {"curvature_engine"}
    report = import_alone("curvature_engine", "top")
    assert not brought_in(report, others | {"fastapi", "celery", "redis", "pydantic", "sqlalchemy", "httpx"})


def test_the_workers_own_process_stays_free_of_torch():
    assert not brought_in(import_alone("curvature_worker.app", "top"), {"torch", "curvature_engine"})


def test_a_confined_process_starts_without_anything_that_makes_threads():
    assert not brought_in(
        import_alone("curvature_worker.bootstrap", "top"), {"torch", "numpy", "celery", "curvature_engine"}
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_writes_connects_and_starts_nothing(package):
    assert import_alone(package, DEPTH.get(package, "top"))["events"] == []
