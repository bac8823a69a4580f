"""The example package with an extension of one's own, installed as operators do, and used by a client."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from tests.integration import cases
from tests.integration.serving import Server

from curvature_client import Client, UnprocessableError

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_extension"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Python of an environment of its own: that of the tests, and the example."""
    folder = tmp_path_factory.mktemp("own") / "env"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    site = site_of(folder)
    (site / "tests.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, "--no-index", "--no-deps", "--no-build-isolation", EXAMPLE], check=True, timeout=60)
    return folder, python


@pytest.fixture(scope="module")
def client(environment, tmp_path_factory):
    """A client of a server in that environment."""
    start = "from curvature_client.command import main; main()"
    server = Server(tmp_path_factory.mktemp("serve") / "data", command=(str(environment[1]), "-c", start))
    with Client(server.url) as client:
        yield client
    assert server.stop() == 0


def site_of(environment):
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


def test_the_catalogue_says_where_it_comes_from(client):
    packages = {entry.name: entry.package for entry in client.extensions().extensions}
    assert packages["batch_lp"] == "curvature-batch-lp 1.0.0"
    assert packages["batch_grad"] is None


@pytest.mark.parametrize("p", [1, 3])
def test_it_is_computed_as_brute_force_says(client, p):
    net, (inputs, targets) = cases.small()
    net, inputs = net.double(), inputs.double()
    group = client.analyze(net, (inputs, targets), [{"name": "batch_lp", "options": {"p": p}}])["batch_lp"]
    for name, parameter in net.named_parameters():
        for n in range(len(inputs)):
            loss = torch.nn.functional.cross_entropy(net(inputs[n : n + 1]), targets[n : n + 1]) / len(inputs)
            (gradient,) = torch.autograd.grad(loss, parameter)
            expected = gradient.abs().pow(p).sum().pow(1 / p)
            torch.testing.assert_close(group[name][n], expected, rtol=1e-10, atol=1e-14)


def test_its_options_are_checked_before_a_job_is_made(client):
    net, batch = cases.small()
    with pytest.raises(UnprocessableError) as caught:
        client.submit(net, batch, [{"name": "batch_lp", "options": {"p": 0.5}}])
    assert (caught.value.code, caught.value.param) == ("invalid_option", "extensions.0.options.p")


def test_a_broken_package_keeps_a_worker_from_starting(environment, client, tmp_path):
    folder, python = environment
    broken = site_of(folder) / "broken-0.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (broken / "entry_points.txt").write_text("[curvature_engine.extensions]\nx = nowhere_at_all:X\n")
    try:
        settings = {"CURVATURE_DATABASE_URL": f"sqlite:///{tmp_path}/db", "CURVATURE_STORAGE_URL": tmp_path.as_uri()}
        worker = subprocess.run(
            [python, "-m", "curvature_worker"],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        shutil.rmtree(broken)
    assert worker.returncode == 1
    assert "the plug-in 'x' (nowhere_at_all:X) of broken 0.1" in worker.stderr
    assert "Traceback" not in worker.stderr
