"""Uploads whose parts go to S3 itself: their sizes are checked, their bytes unverified until a worker hashes them."""

import hashlib
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx
import pytest
from tests.service.planting import expect_problem, sha256, upload
from tests.service.server import LiveServer
from tests.service.test_uploads import DATA, PART, begin, complete, digest, numbers, send_all, slice_of

from curvature_state.artefacts import announce_artefact, find_artefact, judge_artefact
from curvature_state.tables import UploadRow
from curvature_state.uploads import claim_assembly, release_assembly, remove_stale_uploads
from curvature_worker.cache import ArtefactCache
from curvature_worker.errors import JobRefused

pytestmark = pytest.mark.integration

WRONG = hashlib.sha256(b"another seed").digest() * (len(DATA) // 32)
KEY = f"some/prefix/models/{sha256(DATA)}"


@pytest.fixture
def server(s3_server, make_settings):
    with LiveServer(make_settings(storage_url=s3_server.url(), upload_part_bytes=PART)) as server:
        yield server


def address(client, begun, number, part):
    reply = client.post(f"/v1/uploads/{begun['id']}/parts/{number}", headers=digest(part))
    assert reply.status_code == 200, reply.text
    return reply.json()


def send_directly(client, begun, number, data=DATA):
    part = slice_of(data, number)
    where = address(client, begun, number, part)
    assert not where["url"].startswith(str(client.base_url))
    httpx.put(where["url"], content=part, headers=where["headers"], trust_env=False).raise_for_status()


def send_all_directly(client, data=DATA, begun=None):
    begun = begun or begin(client)
    for number in (2, 3, 1):
        send_directly(client, begun, number, data)
    return begun


def content(client):
    return client.get(f"/v1/models/{sha256(DATA)}/content").content


def record(server):
    return find_artefact(server.resources.database, "models", sha256(DATA))


def test_parts_go_past_the_api_and_the_artefact_is_unverified(server, s3_server):
    begun = begin(server.client)
    assert begun["direct"]
    send_all_directly(server.client, begun=begun)
    assert numbers(begin(server.client)) == [1, 2, 3]
    done = complete(server.client, begun)
    assert done.json()["artefact"] | {"created_at": None} == {
        "sha256": sha256(DATA),
        "kind": "models",
        "size_bytes": len(DATA),
        "created_at": None,
        "verified": False,
        "pinned": False,
    }
    assert content(server.client) == DATA
    assert s3_server.objects() == [KEY]
    assert s3_server.unfinished() == []
    assert complete(server.client, begun).json() == done.json()


def test_a_part_that_the_store_took_in_part_has_not_arrived(server):
    begun = begin(server.client)
    part = slice_of(DATA, 1)
    where = address(server.client, begun, 1, part)
    cut = {**where["headers"], "Content-Length": "100"}
    assert httpx.put(where["url"], content=part[:100], headers=cut, trust_env=False).status_code == 200
    assert numbers(begin(server.client)) == []
    send_directly(server.client, begun, 2)
    problem = expect_problem(complete(server.client, begun), 409, "upload_incomplete", "upload_id")
    assert problem["detail"] == "2 of the 3 parts are missing: 1, 3"


def test_an_address_covers_the_parts_size_and_hash(server):
    where = address(server.client, begin(server.client), 3, slice_of(DATA, 3))
    signed = httpx.URL(where["url"]).params["X-Amz-SignedHeaders"]
    assert set(signed.split(";")) == {"host", *(name.lower() for name in where["headers"])}
    assert where["headers"]["Content-Length"] == str(len(slice_of(DATA, 3)))


def test_parts_of_a_direct_upload_are_not_taken_by_the_api(server):
    begun, part = begin(server.client), slice_of(DATA, 1)
    reply = server.client.put(f"/v1/uploads/{begun['id']}/parts/1", content=part, headers=digest(part))
    expect_problem(reply, 422, "invalid_request", "number")


def test_a_client_that_cannot_reach_the_store_goes_through_the_api(server, s3_server):
    direct = begin(server.client)
    begun = send_all(server.client, direct=False)
    assert begun["id"] != direct["id"]
    assert not begun["direct"]
    assert s3_server.unfinished() == []
    assert complete(server.client, begun).json()["artefact"]["verified"]
    assert content(server.client) == DATA
    assert s3_server.objects() == [KEY]


def test_direct_transfers_can_be_turned_off(s3_server, serve):
    server = serve(storage_url=s3_server.url(), upload_part_bytes=PART, direct_transfers="off")
    assert not begin(server.client)["direct"]


def test_addresses_are_those_that_clients_see(s3_server, serve):
    server = serve(storage_url=s3_server.url(), storage_public_endpoint="https://store.example")
    where = address(server.client, begin(server.client), 1, DATA)
    assert where["url"].startswith("https://store.example/curvature/some/prefix/uploads/")


def test_unverified_bytes_never_replace_verified_ones(server, s3_server):
    begun = send_all_directly(server.client, WRONG)
    upload(server.client, "models", DATA)
    assert complete(server.client, begun).json()["artefact"]["verified"]
    assert content(server.client) == DATA
    assert s3_server.objects() == [KEY]


def test_verified_bytes_replace_unverified_ones(server):
    complete(server.client, send_all_directly(server.client, WRONG))
    assert content(server.client) == WRONG
    upload(server.client, "models", DATA)
    assert content(server.client) == DATA
    assert record(server).verified


def test_bytes_that_come_while_a_direct_upload_takes_its_place_stay_unverified(server):
    begun = send_all_directly(server.client, begun=begin(server.client))
    database = server.resources.database
    # As another process leaves it between announcing the artefact and moving its bytes.
    assert claim_assembly(database, begun["id"])
    assert announce_artefact(database, "models", sha256(DATA), len(DATA))
    upload(server.client, "models", DATA)
    assert not record(server).verified
    release_assembly(database, begun["id"])
    upload(server.client, "models", DATA)
    assert record(server).verified


@pytest.fixture
def fetch(server, tmp_path):
    """Fetches the model as a worker does."""
    resources = server.resources
    judge = partial(judge_artefact, resources.database, resources.objects)
    cache = ArtefactCache(resources.objects, tmp_path / "cache", 2**30, judge)
    return lambda: cache.fetch_upload("models", sha256(DATA), lambda: None)


def test_what_a_worker_hashed_is_verified(server, fetch):
    complete(server.client, send_all_directly(server.client))
    assert fetch().read_bytes() == DATA
    assert record(server).verified


def test_wrong_bytes_are_found_by_the_worker_and_can_be_sent_again(server, fetch, s3_server):
    complete(server.client, send_all_directly(server.client, WRONG))
    with pytest.raises(JobRefused) as caught:
        fetch()
    assert caught.value.code == "hash_mismatch"
    expect_problem(server.client.get(f"/v1/models/{sha256(DATA)}/content"), 404, "model_not_found", "model")
    assert s3_server.objects() == []
    complete(server.client, send_all_directly(server.client))
    assert fetch().read_bytes() == DATA


def test_an_upload_that_died_between_joining_and_moving_is_finished(server, s3_server):
    begun = send_all_directly(server.client)
    bucket, key = server.resources.objects.bucket, f"uploads/{begun['id']}"
    with server.resources.database.read() as session:
        store_id = session.get(UploadRow, begun["id"]).store_id
    bucket.finish(key, store_id, bucket.sent_parts(key, store_id))
    assert numbers(begin(server.client)) == [1, 2, 3]
    assert complete(server.client, begun).json()["artefact"]
    assert s3_server.objects() == [KEY]


def test_an_upload_that_the_store_lost_begins_anew(server):
    begun = begin(server.client)
    with server.resources.database.read() as session:
        store_id = session.get(UploadRow, begun["id"]).store_id
    server.resources.objects.bucket.abort(f"uploads/{begun['id']}", store_id)
    expect_problem(complete(server.client, begun), 404, "upload_not_found", "upload_id")
    assert begin(server.client)["id"] != begun["id"]


def test_an_upload_that_is_given_up_leaves_no_parts(server, s3_server):
    begun = begin(server.client)
    send_directly(server.client, begun, 1)
    assert server.client.delete(f"/v1/uploads/{begun['id']}").status_code == 204
    assert s3_server.unfinished() == []


def test_live_uploads_survive_the_removal_of_stale_ones(server, s3_server):
    live, stale = begin(server.client), begin(server.client, WRONG)
    resources, tomorrow = server.resources, datetime.now(UTC) + timedelta(days=1)
    resources.objects.bucket.begin("uploads/of-nobody")
    with resources.database.write() as session:
        session.get(UploadRow, live["id"]).touched_at = tomorrow + timedelta(seconds=1)
    assert remove_stale_uploads(resources.database, resources.objects, tomorrow.timestamp()) == 1
    expect_problem(server.client.get(f"/v1/uploads/{stale['id']}"), 404, "upload_not_found", "upload_id")
    assert s3_server.unfinished() == [f"some/prefix/uploads/{live['id']}"]
