"""What a user's `pip install` would get."""

import re
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [ROOT / folder for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, opened."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", "."], cwd=ROOT, check=True, timeout=60
    )
    (path,) = folder.glob("curvature-*.whl")
    with ZipFile(path) as archive:
        yield archive


def read_metadata(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def requirements_of(wheel, extra):
    """Names of the distributions that an extra asks for, extras of our own followed."""
    metadata = Parser().parsestr(read_metadata(wheel, "METADATA"))
    names, wanted, seen = set(), [extra], set()
    while wanted:
        extra = wanted.pop()
        seen.add(extra)
        for line in metadata.get_all("Requires-Dist"):
            if not re.search(rf"extra == '{extra}'", line):
                continue
            name, own_extras = re.match(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", line).groups()
            names.add(name)
            if name == "curvature":
                wanted += [e.strip() for e in own_extras.split(",") if e.strip() not in seen]
    return names


def test_it_holds_our_packages_and_nothing_else(wheel):
    expected = {
        file.relative_to(package.parent).as_posix()
        for package in PACKAGES
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.parametrize(
    "name",
    [
        *(f"{package.name}/py.typed" for package in PACKAGES),
        "curvature_service/catalogue.json",
        "curvature_service/docs.html",
        "curvature_state/migrations/env.py",
        "curvature_state/migrations/script.py.mako",
        "curvature_state/migrations/versions/0001_first_tables.py",
    ],
)
def test_files_that_are_no_modules_are_there(wheel, name):
    assert name in wheel.namelist()


def test_commands_name_functions_that_exist(wheel):
    targets = re.findall(r"= ([\w.]+):(\w+)$", read_metadata(wheel, "entry_points.txt"), re.MULTILINE)
    assert {module for module, _ in targets} >= {"curvature_service.command", "curvature_worker.command"}
    for module, function in targets:
        source = wheel.read(module.replace(".", "/") + ".py").decode()
        assert re.search(rf"^(def {function}\(|{function}\b.*=)", source, re.MULTILINE), f"{module}:{function}"


def test_only_the_worker_needs_torch(wheel):
    assert "torch" in requirements_of(wheel, "worker")
    assert "torch" not in requirements_of(wheel, "service")


def test_the_base_is_the_client_alone(wheel):
    metadata = Parser().parsestr(read_metadata(wheel, "METADATA"))
    base = {re.match(r"[\w.-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "httpx" in base
    assert base.isdisjoint({"torch", "fastapi", "celery", "sqlalchemy", "redis"})
