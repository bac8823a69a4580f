"""Large uploads and downloads by the client: after every broken connection they go on where they stopped."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
import torch
from tests.client.scripted_server import answering, reply
from tests.integration.cutting_proxy import CuttingProxy, DamagingProxy
from tests.integration.serving import wait_for
from tests.service.planting import sha256, succeed
from tests.service.planting import upload as plant
from tests.service.server import LiveServer, settings_in

from curvature_client import Client, JobFailed
from curvature_client._downloads import StoredFile
from curvature_client._errors import APIConnectionError, BadRequestError
from curvature_client._parted_uploads import PARTS_AT_ONCE, PartedUpload
from curvature_client._payloads import Payload
from curvature_client._transport import Transport
from curvature_client._uploads import IN_PARTS_BYTES, upload
from curvature_protocol.jobs import Job

MIB = 2**20
PART = 5 * MIB
DATA = b"".join(hashlib.sha256(bytes([n])).digest() * (MIB // 32) for n in range(41))
"""Nine parts, the last one short; no two MiB are alike."""
SLACK = MIB
"""Heads of requests, and what was on its way when a connection was cut."""


@pytest.fixture
def settings(tmp_path, redis_server, sqlite_template):
    with redis_server.connect() as connection:
        connection.flushall()
    return lambda **changes: settings_in(tmp_path, redis_server, sqlite_template, upload_part_bytes=PART, **changes)


@pytest.fixture
def api(settings):
    with LiveServer(settings()) as server:
        yield server


@contextmanager
def connected(url, max_retries=2, **changes):
    transport = Transport(url, changes.pop("api_key", None), 30.0, max_retries, None)
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(DATA)
    assert len(DATA) > IN_PARTS_BYTES
    return Payload.of_file(path)


def content(server):
    return server.client.get(f"/v1/models/{sha256(DATA)}/content").content


def arrived(server):
    """Numbers of the parts that have arrived."""
    body = {"kind": "models", "sha256": sha256(DATA), "size_bytes": len(DATA)}
    return [part["number"] for part in server.client.post("/v1/uploads", json=body).json()["parts"]]


class Bar:
    """What a progress bar would show."""

    def __init__(self):
        self.shown, self.first = 0, None

    def upload(self, what, size_bytes):
        self.shown, self.first = 0, None

    def uploaded(self, count):
        self.shown += count
        self.first = self.shown if self.first is None else self.first


# Through the API


def test_a_large_upload_goes_in_parts_and_comes_whole(api, payload):
    with connected(api.url) as transport:
        upload(transport, "models", payload, progress=False)
    assert content(api) == DATA
    assert api.stored() == [f"models/{sha256(DATA)}"]


def test_bytes_in_memory_go_in_parts_too(api):
    with connected(api.url) as transport:
        upload(transport, "models", Payload.of_bytes(DATA), progress=False)
    assert content(api) == DATA


def test_a_connection_cut_in_the_middle_of_parts_costs_these_parts_alone(api, payload):
    bar = Bar()
    with CuttingProxy(api.address, cuts=[3 * PART + PART // 2, 6 * PART]) as proxy, connected(proxy.url) as transport:
        assert PartedUpload(transport, "models", payload, bar).run()
        assert proxy.cuts == []
        assert proxy.sent_bytes <= len(DATA) + 2 * PARTS_AT_ONCE * PART + SLACK
    assert content(api) == DATA
    assert bar.shown == len(DATA)


def test_another_process_sends_only_what_is_missing(api, payload):
    with CuttingProxy(api.address, cuts=[5 * PART]) as proxy, connected(proxy.url, max_retries=0) as transport:
        with pytest.raises(APIConnectionError):
            upload(transport, "models", payload, progress=False)
    there = len(arrived(api))
    assert there > 0
    bar = Bar()
    with CuttingProxy(api.address) as proxy, connected(proxy.url) as transport:
        PartedUpload(transport, "models", payload, bar).run()
        assert proxy.sent_bytes <= len(DATA) - bar.first + SLACK
    assert content(api) == DATA
    # What the API had read of a part when the connection was cut may make it one that has arrived after we asked.
    assert bar.first >= there * PART
    assert bar.first % PART == 0
    assert bar.shown == len(DATA)


class ApiProcess:
    """The API in a process of its own, on a socket that outlives it: whoever connects meanwhile waits."""

    def __init__(self, settings, log):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        names = ("database_url", "storage_url", "redis_url", "upload_part_bytes")
        self._environment = {**os.environ, **{f"CURVATURE_{n.upper()}": str(getattr(settings, n)) for n in names}}
        self._log = log
        self._process = None

    def start(self):
        fd = self._socket.fileno()
        command = [sys.executable, "-m", "curvature_service", "--fd", str(fd)]
        self._process = subprocess.Popen(command, env=self._environment, stderr=self._log, pass_fds=[fd])

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self):
        self.kill()
        self._socket.close()


def test_an_api_that_is_killed_and_started_again_costs_the_parts_under_way_alone(settings, payload, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        api = ApiProcess(settings(), log)
        api.start()
        try:
            with CuttingProxy(api.address) as proxy, connected(proxy.url) as transport:
                thread = threading.Thread(target=upload, args=(transport, "models", payload, False))
                thread.start()
                while proxy.sent_bytes < 4 * PART:
                    pass
                api.kill()
                api.start()
                thread.join()
                assert proxy.sent_bytes <= len(DATA) + PARTS_AT_ONCE * PART + SLACK
                found = httpx.get(f"{proxy.url}/v1/models/{sha256(DATA)}/content", trust_env=False, timeout=30)
                assert found.content == DATA
        finally:
            api.close()


def test_two_clients_send_the_same_at_once(api, payload):
    def send():
        with connected(api.url) as transport:
            upload(transport, "models", payload, progress=False)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(api) == DATA
    assert api.stored() == [f"models/{sha256(DATA)}"]


def test_a_file_that_changes_while_it_is_sent_is_refused(api, payload):
    payload.path.write_bytes(bytes(len(DATA)))
    with connected(api.url) as transport, pytest.raises(BadRequestError) as caught:
        upload(transport, "models", payload, progress=False)
    assert caught.value.code == "hash_mismatch"
    assert api.client.head(f"/v1/models/{sha256(DATA)}").status_code == 404


def test_a_server_of_the_version_before_gets_it_in_one_request():
    received = []

    def answer(handler, body):
        if handler.path == "/v1/uploads":
            problem = b'{"title": "Not found", "status": 404, "detail": "no such path", "code": "not_found"}'
            reply(handler, 404, problem, {"Content-Type": "application/problem+json"})
            return
        received.append(hashlib.sha256(body).hexdigest())
        artefact = f'{{"sha256": "{received[-1]}", "kind": "models", "size_bytes": {len(body)}, '
        reply(handler, 201, (artefact + '"created_at": "2026-01-01T00:00:00Z"}').encode())

    with answering(answer) as (url, _), connected(url) as transport:
        upload(transport, "models", Payload.of_bytes(DATA), progress=False)
    assert received == [sha256(DATA)]


# To the store itself


def test_a_large_upload_goes_past_the_api(settings, s3_server, payload):
    with LiveServer(settings(storage_url=s3_server.url())) as api:
        with CuttingProxy(api.address) as proxy, connected(proxy.url) as transport:
            bar = Bar()
            PartedUpload(transport, "models", payload, bar).run()
            assert proxy.sent_bytes < SLACK
        assert bar.shown == len(DATA)
        assert content(api) == DATA
        assert not api.client.get(f"/v1/models/{sha256(DATA)}").json()["verified"]
        assert s3_server.objects() == [f"some/prefix/models/{sha256(DATA)}"]


def test_a_connection_to_the_store_that_is_cut_costs_the_parts_under_way_alone(settings, s3_server, payload):
    host, port = s3_server.endpoint.removeprefix("http://").split(":")
    with CuttingProxy((host, int(port)), cuts=[3 * PART + PART // 2]) as proxy:
        with LiveServer(settings(storage_url=s3_server.url(), storage_public_endpoint=proxy.url)) as api:
            with connected(api.url) as transport:
                upload(transport, "models", payload, progress=False)
                assert transport.store.usable
            assert proxy.cuts == []
            assert proxy.sent_bytes <= len(DATA) + PARTS_AT_ONCE * PART + SLACK
            assert content(api) == DATA


def answer_with(status):
    def answer(handler, body):
        reply(handler, status)

    return answer


@pytest.mark.parametrize("status", [403, 200], ids=["refuses", "answers 200 and stores nothing"])
def test_a_store_that_is_no_use_is_gone_around(settings, s3_server, payload, status):
    with answering(answer_with(status)) as (url, _):
        with LiveServer(settings(storage_url=s3_server.url(), storage_public_endpoint=url)) as api:
            with connected(api.url, max_retries=1) as transport:
                upload(transport, "models", payload, progress=False)
                assert not transport.store.usable
            assert api.client.get(f"/v1/models/{sha256(DATA)}").json()["verified"]
            assert content(api) == DATA


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_store_that_cannot_be_reached_is_gone_around(settings, s3_server, payload):
    with LiveServer(settings(storage_url=s3_server.url(), storage_public_endpoint=closed_port())) as api:
        with connected(api.url) as transport:
            upload(transport, "models", payload, progress=False)
        assert content(api) == DATA
        assert s3_server.unfinished() == []


# From the store itself


def result(api):
    """A job's result of more than a MiB; returns the path of its file and the bytes."""
    body = {"model": plant(api.client), "batch": {"sha256": plant(api.client, "batches", b"b")}, "loss": "mse"}
    reply = api.client.post("/v1/jobs", json={**body, "extensions": ["variance"]})
    job = Job.model_validate_json(reply.content)
    file = succeed(api, job, values=range(MIB // 2))
    return f"/v1/jobs/{job.id}/result/variance.safetensors", file


def test_a_redirect_is_given_to_who_asks_for_it(settings, s3_server):
    with LiveServer(settings(storage_url=s3_server.url())) as api:
        path, file = result(api)
        sent = api.client.get(path, params={"direct": "true"})
        assert sent.status_code == 307
        assert sent.headers["location"].startswith(s3_server.endpoint)
        assert sent.headers["cache-control"] == "no-store"
        found = httpx.get(sent.headers["location"], headers={"Range": "bytes=10-19"}, trust_env=False)
        assert (found.status_code, found.content) == (206, file[10:20])
        assert api.client.get(path).content == file
        sha = plant(api.client)
        assert api.client.get(f"/v1/models/{sha}/content?direct=true").status_code == 307
        assert api.client.head(f"/v1/models/{sha}/content?direct=true").status_code == 200


def test_a_store_that_signs_nothing_is_read_through_the_api(api):
    path, file = result(api)
    reply = api.client.get(path, params={"direct": "true"}, headers={"Range": "bytes=10-19"})
    assert (reply.status_code, reply.content) == (206, file[10:20])


def test_a_large_result_comes_past_the_api_and_without_the_key(settings, s3_server):
    with LiveServer(settings(storage_url=s3_server.url(), api_key="secret")) as api:
        api.client.headers["Authorization"] = "Bearer secret"
        path, file = result(api)
        keys = []

        def answer(handler, body):
            keys.append(handler.headers.get("Authorization"))
            first, last = (int(n) for n in handler.headers["Range"].removeprefix("bytes=").split("-"))
            reply(handler, 206, file[first : last + 1])

        with answering(answer) as (url, seen):
            api.resources.direct = type(api.resources.direct)(s3_server.url(), url)
            with connected(api.url, api_key="secret") as transport:
                stored = StoredFile(transport, path, len(file))
                assert bytes(stored.read(100, len(file))) == file[100:]
                assert bytes(stored.read(0, 2000)) == file[:2000]
        assert keys == [None, None]
        assert len({path for _, path, _ in seen}) == 1  # the address was used again


def test_an_address_that_is_no_longer_good_is_asked_for_again(settings, s3_server):
    with LiveServer(settings(storage_url=s3_server.url())) as api:
        path, file = result(api)
        with connected(api.url) as transport:
            stored = StoredFile(transport, path, len(file))
            assert bytes(stored.read(0, 10)) == file[:10]
            with answering(answer_with(403)) as (url, seen):
                stored._address = f"{url}/expired"
                assert bytes(stored.read(5, len(file))) == file[5:]
                assert len(seen) == 1
            assert transport.store.usable


@pytest.mark.parametrize("status", [403, 404, 500, 200])
def test_a_store_that_gives_nothing_is_gone_around(settings, s3_server, status):
    with answering(answer_with(status)) as (url, seen):
        with LiveServer(settings(storage_url=s3_server.url(), storage_public_endpoint=url)) as api:
            path, file = result(api)
            with connected(api.url) as transport:
                stored = StoredFile(transport, path, len(file))
                assert bytes(stored.read(0, len(file))) == file
                assert bytes(stored.read(7, 77)) == file[7:77]
        assert len(seen) == 1


def test_a_store_that_cannot_be_reached_is_read_through_the_api(settings, s3_server):
    with LiveServer(settings(storage_url=s3_server.url(), storage_public_endpoint=closed_port())) as api:
        path, file = result(api)
        with connected(api.url) as transport:
            assert bytes(StoredFile(transport, path, len(file)).read(0, len(file))) == file
            assert not transport.store.usable


# A whole job


@pytest.fixture
def cluster(settings, s3_server, tmp_path):
    """An API on S3 and a worker in a process of its own."""
    chosen = settings(storage_url=s3_server.url())
    names = ("database_url", "storage_url", "redis_url")
    environment = {f"CURVATURE_{name.upper()}": str(getattr(chosen, name)) for name in names}
    environment["CURVATURE_SCRATCH_DIR"] = str(tmp_path / "scratch")
    with LiveServer(chosen) as api, (tmp_path / "worker.log").open("wb") as log:
        command = [sys.executable, "-m", "curvature_worker", "--threads", "1"]
        worker = subprocess.Popen(command, env={**os.environ, **environment}, stderr=log)
        try:
            wait_for(lambda: api.client.get("/v1/ready").status_code == 200, 60, "a worker")
            yield api
        finally:
            worker.terminate()
            worker.wait(30)


def linear():
    """A model of 36 MB, and a small batch."""
    torch.manual_seed(0)
    return torch.nn.Linear(3000, 3000), (torch.randn(2, 3000), torch.randn(2, 3000))


def test_a_job_whose_large_files_go_past_the_api(cluster, s3_server):
    model, (inputs, targets) = linear()
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    with CuttingProxy(cluster.address) as proxy, Client(proxy.url, progress=False) as client:
        found = client.analyze(model, (inputs, targets), ["grad"], loss="mse")
        sha = client.jobs.get(found.manifest.job_id).request["model"]
        assert not [key for key in s3_server.objects() if "/uploads/" in key]
        assert torch.allclose(torch.as_tensor(found["grad"]["weight"]), model.weight.grad, rtol=1e-4, atol=1e-9)
        assert client._transport.store.usable
        assert proxy.sent_bytes < SLACK
    assert cluster.client.get(f"/v1/models/{sha}").json()["verified"]  # the worker has hashed it


def test_a_job_whose_model_was_damaged_on_its_way_past_the_api(cluster, s3_server):
    model, batch = linear()
    host, port = s3_server.endpoint.removeprefix("http://").split(":")
    with DamagingProxy((host, int(port))) as proxy, Client(cluster.url, progress=False) as client:
        cluster.resources.direct = type(cluster.resources.direct)(s3_server.url(), proxy.url)
        with pytest.raises(JobFailed) as caught:
            client.analyze(model, batch, ["batch_l2"], loss="mse")
        assert (caught.value.code, caught.value.param) == ("hash_mismatch", "model")
        proxy.damages = False
        assert client.analyze(model, batch, ["batch_l2"], loss="mse")["batch_l2"]["weight"].shape == (2,)
