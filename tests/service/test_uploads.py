"""Large uploads, part by part: found again, filled in any order, put together only if whole and right."""

import base64
import hashlib
import os
import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from tests.service.planting import BATCH, expect_problem, sha256, upload

from curvature_protocol.uploads import MOST_UPLOAD_PARTS
from curvature_service.reconciler import remove_abandoned_uploads
from curvature_state import uploads
from curvature_state.tables import UploadRow

pytestmark = pytest.mark.integration

MIB = 2**20
PART = 5 * MIB
DATA = hashlib.sha256(b"seed").digest() * (11 * MIB // 32)
"""Three parts, the last one short."""


@pytest.fixture(scope="module")
def server_of_parts(tmp_path_factory, redis_server, sqlite_template):
    from tests.service.server import LiveServer, settings_in

    folder = tmp_path_factory.mktemp("parts")
    with LiveServer(settings_in(folder, redis_server, sqlite_template, upload_part_bytes=PART)) as server:
        yield server


@pytest.fixture
def server(server_of_parts):
    server_of_parts.reset()
    return server_of_parts


def digest(data):
    return {"Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"}


def begin(client, data=DATA, **changes):
    reply = client.post(
        "/v1/uploads", json={"kind": "models", "sha256": sha256(data), "size_bytes": len(data), **changes}
    )
    assert reply.status_code in (200, 201), reply.text
    return reply.json()


def slice_of(data, number):
    return data[(number - 1) * PART : number * PART]


def send(client, begun, number, data=DATA):
    part = slice_of(data, number)
    return client.put(f"/v1/uploads/{begun['id']}/parts/{number}", content=part, headers=digest(part))


def complete(client, begun, wait=20):
    return client.post(f"/v1/uploads/{begun['id']}/complete", params={"wait": wait})


def send_all(client, data=DATA, **changes):
    begun = begin(client, data, **changes)
    for number in (3, 1, 2):
        assert send(client, begun, number, data).status_code == 201
    return begun


def numbers(upload):
    return [part["number"] for part in upload["parts"]]


# The way of an upload


def test_parts_in_any_order_become_one_artefact(server):
    begun = send_all(server.client)
    done = complete(server.client, begun)
    assert done.status_code == 200
    assert done.json()["artefact"]["verified"]
    assert server.client.get(f"/v1/models/{sha256(DATA)}/content").content == DATA
    assert server.stored() == [f"models/{sha256(DATA)}"]


def test_the_same_request_again_finds_the_upload_and_its_parts(server):
    begun = begin(server.client)
    assert begun["part_bytes"] == PART
    assert not begun["direct"]
    send(server.client, begun, 2)
    again = begin(server.client)
    assert again["id"] == begun["id"]
    assert [(p["number"], p["size_bytes"], p["sha256"]) for p in again["parts"]] == [
        (2, PART, sha256(slice_of(DATA, 2)))
    ]
    assert server.client.get(f"/v1/uploads/{begun['id']}").json()["parts"] == again["parts"]


def test_what_is_there_needs_no_upload(client):
    upload(client, "batches", BATCH)
    found = begin(client, BATCH, kind="batches")
    assert found["id"] is None
    assert found["artefact"]["size_bytes"] == len(BATCH)


def test_completing_twice_gives_the_same_artefact(client):
    begun = send_all(client)
    first, second = complete(client, begun), complete(client, begun)
    assert first.json()["artefact"] == second.json()["artefact"] is not None
    assert client.get(f"/v1/uploads/{begun['id']}").json()["artefact"] == first.json()["artefact"]


def test_missing_parts_are_named(client):
    begun = begin(client)
    send(client, begun, 2)
    problem = expect_problem(complete(client, begun), 409, "upload_incomplete", "upload_id")
    assert problem["detail"] == "2 of the 3 parts are missing: 1, 3"


def test_an_upload_that_is_given_up_leaves_nothing(server):
    begun = begin(server.client)
    send(server.client, begun, 1)
    assert server.client.delete(f"/v1/uploads/{begun['id']}").status_code == 204
    assert server.stored() == []
    for reply in (send(server.client, begun, 2), complete(server.client, begun)):
        expect_problem(reply, 404, "upload_not_found", "upload_id")
    assert begin(server.client)["id"] != begun["id"]


def test_an_upload_is_its_tenants_alone(server):
    new = uploads.NewUpload("somebody", "models", sha256(DATA), len(DATA), PART)
    theirs = uploads.create_upload(server.resources.database, new, uploads.new_upload_id(), None)
    expect_problem(server.client.get(f"/v1/uploads/{theirs.id}"), 404, "upload_not_found", "upload_id")
    assert begin(server.client)["id"] != theirs.id


def test_a_client_that_uploads_what_another_one_finished_is_told(client):
    begun = send_all(client)
    complete(client, begun)
    assert send(client, begun, 1).status_code == 200
    assert complete(client, begun).json()["artefact"]


def test_two_clients_upload_the_same_at_once(server):
    barrier = threading.Barrier(2)
    replies = []

    def client_of_its_own():
        begun = begin(server.client)
        barrier.wait(10)
        replies.extend(send(server.client, begun, number).status_code for number in (1, 2, 3))
        done = complete(server.client, begun)
        replies.append(done.status_code)
        assert done.json()["artefact"]["sha256"] == sha256(DATA)

    threads = [threading.Thread(target=client_of_its_own) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 8
    assert set(replies) <= {200, 201}
    assert server.stored() == [f"models/{sha256(DATA)}"]


# Parts


def test_a_part_that_is_not_its_hash_is_refused_and_not_kept(server):
    begun = begin(server.client)
    path = f"/v1/uploads/{begun['id']}/parts/1"
    reply = server.client.put(path, content=bytes(PART), headers=digest(slice_of(DATA, 1)))
    expect_problem(reply, 400, "hash_mismatch", "sha256")
    assert numbers(begin(server.client)) == []
    assert server.stored() == []


@pytest.mark.parametrize("size", [0, 1000, PART - 1, PART + 1, 3 * PART])
def test_a_part_of_another_size_is_refused(server, size):
    begun, data = begin(server.client), bytes(size)
    reply = server.client.put(f"/v1/uploads/{begun['id']}/parts/1", content=data, headers=digest(data))
    expect_problem(reply, 422, "invalid_request", "number")
    assert server.stored() == []


def test_a_part_that_has_arrived_is_not_read_again(client):
    begun = begin(client)
    send(client, begun, 1)
    part = slice_of(DATA, 1)
    reply = client.put(f"/v1/uploads/{begun['id']}/parts/1", content=b"not looked at", headers=digest(part))
    assert reply.status_code == 200
    assert reply.json()["sha256"] == sha256(part)


def test_a_part_can_be_replaced(client):
    begun, wrong = begin(client), bytes(PART)
    client.put(f"/v1/uploads/{begun['id']}/parts/1", content=wrong, headers=digest(wrong))
    for number in (1, 2, 3):
        assert send(client, begun, number).status_code == 201
    assert complete(client, begun).json()["artefact"]


@pytest.mark.parametrize("number", [0, 4])
def test_a_part_that_the_upload_does_not_have_is_refused(client, number):
    begun = begin(client)
    reply = client.put(f"/v1/uploads/{begun['id']}/parts/{number}", content=b"x", headers=digest(b"x"))
    problem = expect_problem(reply, 422, "invalid_request", "number")
    assert problem["detail"] == f"upload {begun['id']} has parts 1 to 3; part {number} came"


@pytest.mark.parametrize("header", ["", "sha-512=:AAAA:", f"sha-256=:{'A' * 42}=:", "sha-256=AAAA", "md5=:AAAA:"])
def test_a_part_without_its_hash_is_refused(client, header):
    begun = begin(client)
    reply = client.put(f"/v1/uploads/{begun['id']}/parts/1", content=b"x", headers={"Content-Digest": header})
    expect_problem(reply, 422, "invalid_request", "Content-Digest")


def test_a_hash_may_stand_among_others(client):
    begun, part = begin(client), slice_of(DATA, 1)
    header = f"sha-512=:AAAA:, {digest(part)['Content-Digest']}, md5=:AAAA:"
    reply = client.put(f"/v1/uploads/{begun['id']}/parts/1", content=part, headers={"Content-Digest": header})
    assert reply.status_code == 201


def test_an_address_is_given_for_direct_uploads_only(client):
    begun = begin(client)
    reply = client.post(f"/v1/uploads/{begun['id']}/parts/1", headers=digest(slice_of(DATA, 1)))
    problem = expect_problem(reply, 422, "invalid_request", "number")
    assert problem["remedy"] == f"PUT the part to /v1/uploads/{begun['id']}/parts/1"


def test_too_large_an_upload_is_refused_before_any_byte(serve):
    server = serve(max_upload_bytes=1000)
    reply = server.client.post("/v1/uploads", json={"kind": "models", "sha256": "0" * 64, "size_bytes": 1001})
    expect_problem(reply, 413, "payload_too_large")


def test_a_huge_upload_has_larger_parts_and_not_more(serve):
    size = 10**12
    client = serve(max_upload_bytes=size).client
    begun = client.post("/v1/uploads", json={"kind": "models", "sha256": "0" * 64, "size_bytes": size}).json()
    assert begun["part_bytes"] * MOST_UPLOAD_PARTS >= size
    assert begun["part_bytes"] % MIB == 0


# Putting them together


def test_right_parts_of_wrong_bytes_are_refused_and_sent_again(server):
    client = server.client
    begun = begin(client)
    for number in (1, 2, 3):
        part = bytes(len(slice_of(DATA, number)))
        client.put(f"/v1/uploads/{begun['id']}/parts/{number}", content=part, headers=digest(part))
    expect_problem(complete(client, begun), 400, "hash_mismatch", "sha256")
    assert client.head(f"/v1/models/{sha256(DATA)}").status_code == 404
    problem = expect_problem(client.get(f"/v1/uploads/{begun['id']}"), 400, "hash_mismatch", "sha256")
    assert sha256(DATA) in problem["detail"]
    again = send_all(client)
    assert again["id"] != begun["id"]
    assert complete(client, again).json()["artefact"]
    assert server.stored() == [f"models/{sha256(DATA)}"]


def test_a_part_lost_from_the_store_is_sent_again(server):
    begun = send_all(server.client)
    server.resources.objects.delete(f"uploads/{begun['id']}/2")
    expect_problem(complete(server.client, begun), 409, "upload_incomplete", "upload_id")
    assert numbers(begin(server.client)) == [1, 3]
    assert send(server.client, begun, 2).status_code == 201
    assert complete(server.client, begun).json()["artefact"]


def test_while_another_process_puts_the_parts_together_one_waits(server):
    begun = send_all(server.client)
    assert uploads.claim_assembly(server.resources.database, begun["id"])
    reply = complete(server.client, begun, wait=0)
    assert reply.status_code == 202
    assert reply.json()["assembling"]
    uploads.release_assembly(server.resources.database, begun["id"])
    assert complete(server.client, begun).json()["artefact"]


def test_the_work_of_a_process_that_died_is_taken_up(server):
    begun = send_all(server.client)
    assert uploads.claim_assembly(server.resources.database, begun["id"])
    with server.resources.database.write() as session:
        session.execute(update(UploadRow).values(assembling_until=datetime.now(UTC) - timedelta(seconds=1)))
    assert complete(server.client, begun).json()["artefact"]


def test_a_client_that_does_not_wait_finds_the_work_done_later(client):
    begun = send_all(client)
    complete(client, begun, wait=0)
    assert complete(client, begun).json()["artefact"]


# Those that nobody goes on with


def test_uploads_without_a_sign_of_life_are_removed_after_a_day(server):
    stale, live = begin(server.client), begin(server.client, DATA[::-1])
    send(server.client, stale, 1)
    send(server.client, live, 1, DATA[::-1])
    with server.resources.database.write() as session:
        long_ago = datetime.now(UTC) - timedelta(days=2)
        session.execute(update(UploadRow).where(UploadRow.id == stale["id"]).values(touched_at=long_ago))
    for begun in (stale, live):  # a long upload's first parts are old
        os.utime(server.folder / f"uploads/{begun['id']}/1", (1000, 1000))
    remove_abandoned_uploads(server.resources)
    assert server.stored() == [f"uploads/{live['id']}/1"]
    expect_problem(server.client.get(f"/v1/uploads/{stale['id']}"), 404, "upload_not_found", "upload_id")
    assert numbers(begin(server.client, DATA[::-1])) == [1]
