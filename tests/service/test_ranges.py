"""HTTP ranges (RFC 9110, section 14) on stored bytes."""

import pytest
from tests.service.planting import expect_problem, sha256, upload

pytestmark = pytest.mark.integration

DATA = bytes(range(100))
ETAG = f'"{sha256(DATA)}"'


@pytest.fixture
def get(client):
    path = f"/v1/batches/{upload(client, 'batches', DATA)}/content"
    return lambda wanted, **headers: client.get(path, headers={"Range": wanted, **headers})


@pytest.mark.parametrize(
    ("wanted", "expected", "content_range"),
    [
        ("bytes=0-9", DATA[:10], "bytes 0-9/100"),
        ("bytes=10-10", DATA[10:11], "bytes 10-10/100"),
        ("bytes=90-", DATA[90:], "bytes 90-99/100"),
        ("bytes=0-", DATA, "bytes 0-99/100"),
        ("bytes=-5", DATA[-5:], "bytes 95-99/100"),
        ("bytes=-500", DATA, "bytes 0-99/100"),
        ("bytes=95-500", DATA[95:], "bytes 95-99/100"),
        ("bytes=95-" + "9" * 5000, DATA[95:], "bytes 95-99/100"),
        ("Bytes=0-1", DATA[:2], "bytes 0-1/100"),
    ],
)
def test_a_range_gives_its_part(get, wanted, expected, content_range):
    reply = get(wanted)
    assert reply.status_code == 206
    assert reply.content == expected
    assert reply.headers["content-range"] == content_range
    assert reply.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize("wanted", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=" + "9" * 5000 + "-"])
def test_a_range_outside_is_not_satisfiable(get, wanted):
    reply = get(wanted)
    expect_problem(reply, 416, "range_not_satisfiable", "Range")
    assert reply.headers["content-range"] == "bytes */100"


@pytest.mark.parametrize(
    "wanted", ["bytes=-", "bytes=9-3", "bytes=a-b", "bytes=1", "items=0-1", "bytes=0-1,5-6", "nonsense", ""]
)
def test_malformed_and_multiple_ranges_give_the_whole(get, wanted):
    reply = get(wanted)
    assert reply.status_code == 200
    assert reply.content == DATA


def test_a_range_counts_if_the_bytes_are_those_the_client_knows(get):
    assert get("bytes=0-1", **{"If-Range": ETAG}).status_code == 206


@pytest.mark.parametrize("known", ['"other"', f"W/{ETAG}", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_range_of_other_bytes_gives_the_whole(get, known):
    assert get("bytes=0-1", **{"If-Range": known}).status_code == 200


def test_head_ignores_ranges(client):
    path = f"/v1/batches/{upload(client, 'batches', DATA)}/content"
    reply = client.head(path, headers={"Range": "bytes=0-9"})
    assert reply.status_code == 200
    assert reply.headers["content-length"] == "100"


def test_no_range_of_an_empty_object_is_satisfiable(client):
    path = f"/v1/batches/{upload(client, 'batches', b'')}/content"
    expect_problem(client.get(path, headers={"Range": "bytes=0-"}), 416, "range_not_satisfiable", "Range")
