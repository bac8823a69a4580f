"""The manifests name only things that exist, and the scaler counts the right jobs. (Their syntax is the linter's.)"""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from sqlalchemy import text, update
from tests.state.servers import PostgresServer
from typer.main import get_command

from curvature_service import create_app
from curvature_service.admin.command import app as admin
from curvature_service.settings import ServiceSettings
from curvature_state import Database, migrate
from curvature_state.jobs import NewJob, create_job
from curvature_state.tables import JobRow
from curvature_worker.settings import WorkerSettings

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
DOCKERFILE = (FOLDER.parents[1] / "Dockerfile").read_text(encoding="utf-8")
RESOURCES = [
    (path.name, resource)
    for path in sorted(FOLDER.glob("*.yaml"))
    for resource in YAML(typ="safe").load_all(path.read_text(encoding="utf-8"))
]
BY_NAME = {(resource["kind"], resource.get("metadata", {}).get("name")): resource for _, resource in RESOURCES}
PODS = {
    resource["metadata"]["name"]: resource["spec"]["template"]["spec"]
    for _, resource in RESOURCES
    if resource["kind"] in ("Deployment", "Job")
}
SETTINGS = {"curvature-service": ServiceSettings, "curvature-worker": WorkerSettings}


def container(pod):
    (only,) = PODS[pod]["containers"]
    return only


def test_kustomize_applies_every_file():
    listed = BY_NAME["Kustomization", None]["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("pod", PODS)
def test_images_are_targets_of_the_dockerfile_and_have_a_version(pod):
    image = container(pod)["image"]
    assert re.search(rf"^FROM \S+ AS {image.removeprefix('curvature-')}$", DOCKERFILE, re.MULTILINE)
    assert image in {entry["name"] for entry in BY_NAME["Kustomization", None]["images"]}


@pytest.mark.parametrize("pod", PODS)
def test_every_variable_is_a_setting(pod):
    fields = set(SETTINGS[container(pod)["image"]].model_fields)
    own = {entry["name"] for entry in container(pod).get("env", [])}
    assert {name.removeprefix("CURVATURE_").lower() for name in own} <= fields
    shared = {*BY_NAME["ConfigMap", "curvature"]["data"], *BY_NAME["Secret", "curvature"]["stringData"]}
    everywhere = {field for settings in SETTINGS.values() for field in settings.model_fields}
    ours = {name.removeprefix("CURVATURE_").lower() for name in shared if name.startswith("CURVATURE_")}
    assert ours <= everywhere


@pytest.mark.parametrize("pod", PODS)
def test_pods_have_no_privileges(pod):
    context = PODS[pod]["securityContext"]
    assert context["runAsNonRoot"]
    assert str(context["runAsUser"]) in DOCKERFILE
    assert PODS[pod]["automountServiceAccountToken"] is False
    inner = container(pod)["securityContext"]
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_probes_ask_paths_and_parameters_of_the_api():
    paths = create_app(ServiceSettings()).openapi()["paths"]
    asked = [container("curvature-service")[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")]
    for path, _, query in (address.partition("?") for address in asked):
        assert "get" in paths[path]
        assert {part.split("=")[0] for part in query.split("&") if part} <= {
            parameter["name"] for parameter in paths[path]["get"].get("parameters", [])
        }


def test_the_migration_is_a_command_of_ours():
    assert container("curvature-migration")["command"][:4] == ["tini", "--", "curvature", "admin"]
    assert container("curvature-migration")["command"][4] in get_command(admin).commands


def test_the_scaler_scales_what_there_is_with_what_is_in_the_secret():
    scaled = [resource for _, resource in RESOURCES if resource["kind"] == "ScaledObject"]
    assert {resource["spec"]["scaleTargetRef"]["name"] for resource in scaled} == {
        name for kind, name in BY_NAME if kind == "Deployment" and name != "curvature-service"
    }
    (reference,) = BY_NAME["TriggerAuthentication", "curvature-database"]["spec"]["secretTargetRef"]
    assert reference["key"] in BY_NAME["Secret", reference["name"]]["stringData"]


@pytest.fixture(scope="module")
def database():
    server = PostgresServer()
    try:
        server.start()
        url = server.url(server.create_database())
        migrate(url)
        database = Database(url)
        yield database
        database.close()
    finally:
        server.close()


@pytest.mark.integration
def test_the_scaler_counts_jobs_that_wait_or_run_by_what_they_need(database):
    later = datetime.now(UTC) + timedelta(hours=1)
    cases = [
        *[{}] * 3,
        *[{"status": "running"}] * 2,
        {"status": "cancelling"},
        *[{"requires_gpu": True}] * 4,
        {"not_before": later},
        {"not_before": later - timedelta(hours=2)},
        *[{"status": status} for status in ("succeeded", "failed", "cancelled", "waiting")],
    ]
    for number, changes in enumerate(cases):
        job = create_job(database, NewJob({}, "digest", idempotency_key=str(number))).job
        if changes:
            with database.write() as session:
                session.execute(update(JobRow).where(JobRow.id == job.id).values(**changes))

    def count(name):
        (trigger,) = BY_NAME["ScaledObject", name]["spec"]["triggers"]
        with database.read() as session:
            return session.scalar(text(trigger["metadata"]["query"]))

    assert count("curvature-worker-cpu") == 3 + 2 + 1 + 1
    assert count("curvature-worker-gpu") == 4
