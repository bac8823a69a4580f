"""Dockerfile and docker-compose.yml name only things that exist. (Their syntax is the linters' matter.)"""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from curvature_service import create_app
from curvature_service.settings import ServiceSettings
from curvature_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE = YAML(typ="safe").load(COMPOSE_TEXT)
SETTINGS = {"service": ServiceSettings, "worker": WorkerSettings}
OURS = {name: part for name, part in COMPOSE["services"].items() if "build" in part}


def stage(target):
    """The Dockerfile's lines from `FROM … AS target` to the next stage."""
    (found,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return found


def entrypoint(target):
    (found,) = re.findall(r"^ENTRYPOINT (\[.*\])$", stage(target), re.MULTILINE)
    return json.loads(found)


@cache
def help_of(module):
    """What `python -m module --help` prints."""
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def variables_of(part):
    return {name.removeprefix("CURVATURE_").lower() for name in part["environment"] if name.startswith("CURVATURE_")}


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_of_the_process_that_gets_it(name):
    settings = SETTINGS[OURS[name]["build"]["target"]]
    assert variables_of(OURS[name]) <= set(settings.model_fields)


def test_every_variable_taken_from_the_outside_is_a_setting():
    known = {field for settings in SETTINGS.values() for field in settings.model_fields}
    assert {name.lower() for name in re.findall(r"CURVATURE_([A-Z_]+)", COMPOSE_TEXT)} <= known


@pytest.mark.parametrize("name", OURS)
def test_commands_are_of_modules_and_options_that_exist(name):
    part = OURS[name]
    entry = entrypoint(part["build"]["target"])
    assert entry[:4] == ["tini", "--", "python", "-m"]
    module = entry[4]
    assert importlib.util.find_spec(f"{module}.__main__")
    options = [word for word in [*entry[5:], *part["command"]] if word.startswith("--")]
    assert options
    for option in options:
        assert re.search(rf"{option}\b", help_of(module)), option


def test_health_checks_ask_paths_of_the_api():
    asked = re.findall(r"http://[\w.]+:8000(/[\w/]+)", DOCKERFILE + COMPOSE_TEXT)
    assert len(asked) == 3
    assert set(asked) <= set(create_app(ServiceSettings()).openapi()["paths"])


def test_only_the_api_is_published_and_on_loopback_unless_told_otherwise():
    published = {name: part["ports"] for name, part in COMPOSE["services"].items() if "ports" in part}
    assert published == {"gateway": ["${API_ADDRESS:-127.0.0.1}:${API_PORT:-8000}:8000"]}


def test_the_gateway_holds_nothing_back():
    """Buffered uploads would fill its disk, and buffered events come too late."""
    configuration = COMPOSE["configs"]["gateway"]["content"]
    assert "server service:8000" in configuration
    for line in ("proxy_request_buffering off;", "proxy_buffering off;", "client_max_body_size 0;"):
        assert line in configuration


def test_images_and_their_ways_to_s3():
    for target in SETTINGS:
        assert f"[{target},s3]" in stage(f"{target}-dependencies")


def test_secrets_come_from_the_environment():
    secrets = [
        value
        for part in COMPOSE["services"].values()
        for name, value in part.get("environment", {}).items()
        if re.search("PASSWORD|KEY|SECRET|TOKEN", name)
    ]
    assert secrets
    assert all(value is None or value.startswith("${") for value in secrets)


@pytest.mark.parametrize("target", SETTINGS)
def test_images_run_as_an_ordinary_user(target):
    assert re.findall(r"^USER (.*)$", stage(target), re.MULTILINE) == ["10001:10001"]


def test_the_images_get_all_source_roots_and_nothing_more():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    roots = {package.split("/")[0] for package in packages}
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert roots < admitted
    assert admitted == copied
