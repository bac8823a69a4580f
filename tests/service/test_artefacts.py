"""Uploads: hashed on the way, bounded, all or nothing."""

import hashlib
import socket
import threading

import pytest
from tests.service.planting import BATCH, MODEL, expect_problem, sha256, upload

pytestmark = pytest.mark.integration

ABSENT = "0" * 64


def test_an_upload_is_stored_under_its_hash(server):
    reply = server.client.put(f"/v1/models/{sha256(MODEL)}", content=MODEL)
    assert reply.status_code == 201
    assert reply.json() | {"created_at": None} == {
        "sha256": sha256(MODEL),
        "kind": "models",
        "size_bytes": len(MODEL),
        "created_at": None,
        "verified": True,
        "pinned": False,
    }
    assert server.stored() == [f"models/{sha256(MODEL)}"]


def test_uploading_again_answers_200_and_reads_no_body(client):
    upload(client)
    reply = client.put(f"/v1/models/{sha256(MODEL)}", content=b"not even looked at")
    assert reply.status_code == 200
    assert reply.json()["size_bytes"] == len(MODEL)


def test_an_early_answer_reaches_a_client_that_still_sends(client):
    sha = upload(client)
    reply = client.put(f"/v1/models/{sha}", content=(bytes(2**20) for _ in range(64)))
    assert reply.status_code == 200
    assert client.get("/v1/health").status_code == 200


def test_kinds_are_kept_apart(client):
    upload(client, "models", MODEL)
    expect_problem(client.get(f"/v1/batches/{sha256(MODEL)}"), 404, "batch_not_found", "batch")
    expect_problem(client.get(f"/v1/losses/{sha256(MODEL)}"), 404, "loss_not_found", "loss")
    upload(client, "losses", MODEL)
    assert client.get(f"/v1/losses/{sha256(MODEL)}").json()["kind"] == "losses"
    assert client.get(f"/v1/losses/{sha256(MODEL)}/content").content == MODEL


def test_metadata_and_bytes_read_back(client):
    sha = upload(client, "batches", BATCH)
    assert client.get(f"/v1/batches/{sha}").json()["kind"] == "batches"
    reply = client.get(f"/v1/batches/{sha}/content")
    assert reply.content == BATCH
    assert reply.headers["etag"] == f'"{sha}"'
    assert reply.headers["content-type"] == "application/octet-stream"


def test_head_has_the_headers_of_get_and_no_body(client):
    sha = upload(client)
    for path in (f"/v1/models/{sha}?wait=0", f"/v1/models/{sha}/content"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.headers["content-length"] == str(len(MODEL))
    assert head.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("path", [f"/v1/models/{ABSENT}", f"/v1/models/{ABSENT}/content"])
def test_what_is_not_there(client, path):
    problem = expect_problem(client.get(path), 404, "model_not_found", "model")
    assert problem["remedy"] == f"PUT its bytes to /v1/models/{ABSENT}"
    assert client.head(path).status_code == 404


def test_wrong_bytes_are_refused_and_leave_nothing(server):
    problem = expect_problem(server.client.put(f"/v1/models/{ABSENT}", content=MODEL), 400, "hash_mismatch", "sha256")
    assert sha256(MODEL) in problem["detail"]
    assert server.stored() == []
    assert server.client.head(f"/v1/models/{ABSENT}").status_code == 404


def test_a_name_that_is_no_hash_is_refused(client):
    expect_problem(client.put(f"/v1/models/{'A' * 64}", content=MODEL), 422, "invalid_request", "sha256")


def test_an_empty_upload_is_stored(client):
    upload(client, "batches", b"")
    assert client.get(f"/v1/batches/{sha256(b'')}/content").content == b""


# Limits


def test_an_announced_size_beyond_the_limit_is_refused_before_any_byte(serve):
    server = serve(max_upload_bytes=1000)
    with socket.create_connection(server.address) as connection:
        head = f"PUT /v1/models/{ABSENT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert server.stored() == []


def test_a_stream_is_cut_off_at_the_limit(serve):
    server = serve(max_upload_bytes=10 * 2**20)
    parts = iter([bytes(2**20)] * 11)
    reply = server.client.put(f"/v1/models/{ABSENT}", content=parts)
    problem = expect_problem(reply, 413, "payload_too_large")
    assert "10485760" in problem["detail"]
    assert server.stored() == []


def test_a_stream_of_just_the_limit_is_stored(serve):
    server = serve(max_upload_bytes=5 * 2**20)
    data = bytes(5 * 2**20)
    reply = server.client.put(f"/v1/models/{sha256(data)}", content=iter([data]))
    assert reply.status_code == 201


# Clients that break off, and twins


def test_a_client_that_goes_away_leaves_nothing(server):
    data = bytes(20 * 2**20)
    with socket.create_connection(server.address) as connection:
        head = f"PUT /v1/models/{sha256(data)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[: len(data) // 2])
        while not server.stored():
            pass
    while server.stored():
        pass
    assert server.client.head(f"/v1/models/{sha256(data)}").status_code == 404


def test_the_same_upload_from_two_clients_at_once(server):
    data = bytes(range(256)) * 40000
    barrier = threading.Barrier(2)
    statuses = []

    def parts():
        yield data[:1000]
        barrier.wait(10)  # both are under way before either ends
        yield data[1000:]

    def put():
        statuses.append(server.client.put(f"/v1/models/{sha256(data)}", content=parts()).status_code)

    threads = [threading.Thread(target=put) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 201}
    assert 201 in statuses
    assert server.stored() == [f"models/{sha256(data)}"]


def test_bytes_lost_from_the_store_can_be_uploaded_again(server):
    sha = upload(server.client)
    server.resources.objects.delete(f"models/{sha}")
    assert server.client.head(f"/v1/models/{sha}").status_code == 404
    assert server.client.get(f"/v1/models/{sha}/content").status_code == 404
    assert server.client.put(f"/v1/models/{sha}", content=MODEL).status_code == 201
    assert server.stored() == [f"models/{sha}"]


def test_a_large_upload_reads_back_whole(client):
    data = hashlib.sha256(b"seed").digest() * 2**19  # 16 MiB: several parts
    upload(client, "models", data)
    assert client.get(f"/v1/models/{sha256(data)}/content").content == data


def test_a_store_that_cannot_be_written_is_503(serve):
    server = serve()
    (server.folder / "models").write_text("a file where a folder must be")
    problem = expect_problem(server.client.put(f"/v1/models/{sha256(MODEL)}", content=MODEL), 503, "unavailable")
    assert problem["detail"] == "the server's object store does not answer"
