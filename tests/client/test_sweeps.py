"""A sweep as the client sees it, against a server that answers as told."""

import json
import socket
import sys
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.client.scripted_server import answering, reply

from curvature_client import Client, CurvatureError, JobCancelled, JobFailed, UnprocessableError, WaitTimeout
from curvature_client._frames import COLUMNS

SWEEP_ID = "5" * 32
MOMENT = "2026-01-15T09:30:0{}Z"
STATUS = {"q": "queued", "r": "running", "s": "succeeded", "f": "failed", "c": "cancelled"}
PROBLEM = {"title": "x", "status": 422, "detail": "no samples", "code": "empty_batch", "remedy": "send some"}


class Told:
    """Answers about one sweep whose states are those of `looks`, one after another."""

    def __init__(self, *looks, axes=("seed",), broken=()):
        self.looks, self.axes, self.broken = list(looks), axes, set(broken)
        self.turn, self.asked = 0, []
        self.lock = threading.Lock()

    @property
    def states(self):
        return self.looks[min(self.turn, len(self.looks) - 1)]

    def __call__(self, handler, body):
        url = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with self.lock:
            self.asked.append((url.path.rpartition("/")[2], query))
            name = url.path.removeprefix(f"/v1/sweeps/{SWEEP_ID}").strip("/")
            if name == "states":
                place, self.turn = self.turn, self.turn + 1
                if place in self.broken:
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                found = {"states": self.looks[min(place, len(self.looks) - 1)]}
            else:
                found = self.rows(query) if name == "rows" else self.view()
        reply(handler, 200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def view(self):
        counts = {STATUS[letter]: self.states.count(letter) for letter in set(self.states) - {"-"}}
        done = not set(self.states) & set("qr")
        base = {"id": SWEEP_ID, "created_at": MOMENT.format(0), "axes": self.axes}
        return {**base, "total": len(self.states), "counts": counts, "done": done}

    def rows(self, query):
        first, limit = int(query["first"]), int(query["limit"])
        items = [self.row(place) for place in range(first, min(first + limit, len(self.states)))]
        following = first + limit
        return {"items": [row for row in items if row], "next_row": following if following < len(self.states) else None}

    def row(self, place):
        letter = self.looks[min(max(0, self.turn - 1), len(self.looks) - 1)][place]
        if letter == "-":
            return None
        row = {"row": place, "job_id": f"{place:032x}", "coordinates": dict.fromkeys(self.axes, place)}
        row |= {"status": STATUS[letter], "created_at": MOMENT.format(0)}
        if letter in "rsf":
            row |= {"started_at": MOMENT.format(1)}
        if letter in "sf":
            row |= {"finished_at": MOMENT.format(3)}
        return {**row, "error": PROBLEM if letter == "f" else None, "result": {"loss": 0.5} if letter == "s" else None}


@pytest.fixture
def sweep():
    """Makes a sweep of which a server tells."""
    opened = []

    def make(*looks, **changes):
        told = Told(*looks, **changes)
        context = answering(told)
        url, _ = context.__enter__()
        client = Client(url, max_retries=0)
        opened.append((client, context))
        return client.sweeps.get(SWEEP_ID), told

    yield make
    for client, context in opened:
        client.close()
        context.__exit__(None, None, None)


def test_a_wait_ends_when_every_row_is_over(sweep):
    found, told = sweep("qqq", "sqq", "sfc")
    assert found.wait() is found
    assert (found.done, found.counts, len(found)) == (True, {"succeeded": 1, "failed": 1, "cancelled": 1}, 3)
    asked = [query for name, query in told.asked if name == "states"]
    assert [query.get("finished") for query in asked] == [None, "0", "1"]


def test_a_wait_outlasts_broken_connections(sweep):
    found, _ = sweep("qq", "qq", "qq", "ss", broken={1, 2})
    assert found.wait(30).done


def test_a_wait_that_is_too_short_says_how_to_go_on(sweep):
    found, _ = sweep("sqr")
    with pytest.raises(WaitTimeout, match=r"2 of the 3 jobs .* are not over; the sweep goes on") as caught:
        found.wait(0)
    assert (caught.value.sweep_id, caught.value.job_id) == (SWEEP_ID, None)
    assert f"client.sweeps.get('{SWEEP_ID}')" in caught.value.remedy


def test_rows_come_as_they_end_each_once(sweep):
    found, _ = sweep("qqqq", "qsqq", "fsqq", "fsqq", "fssc")
    assert [(row.number, row.status) for row in found.completed()] == [
        (1, "succeeded"),
        (0, "failed"),
        (2, "succeeded"),
        (3, "cancelled"),
    ]


def test_whoever_comes_late_misses_no_row(sweep):
    found, _ = sweep("sfs")
    assert [row.number for row in found.completed()] == [0, 1, 2]
    assert [row.number for row in found.completed()] == [0, 1, 2]


def test_a_deleted_row_is_not_waited_for(sweep):
    found, _ = sweep("q-s", "s-s")
    assert [row.number for row in found.completed()] == [2, 0]


def test_rows_that_are_neighbours_are_asked_for_together(sweep):
    found, told = sweep("s" * 2500)
    assert len(list(found.completed())) == 2500
    pages = [(query["first"], query["limit"]) for name, query in told.asked if name == "rows"]
    assert pages == [("0", "1000"), ("1000", "1000"), ("2000", "500")]


def test_a_row_tells_what_became_of_it(sweep):
    found, _ = sweep("sfcq")
    rows = found.rows
    assert [row.coordinates for row in rows] == [{"seed": place} for place in range(4)]
    assert [type(row.error) for row in rows] == [type(None), type(rows[1].error), JobCancelled, type(None)]
    with pytest.raises(JobFailed, match="no samples; send some") as caught:
        rows[1].result()
    assert isinstance(caught.value, UnprocessableError)
    assert (caught.value.code, caught.value.job_id) == ("empty_batch", rows[1].job_id)
    with pytest.raises(JobCancelled):
        rows[2].result()
    assert repr(rows[0]) == "<SweepRow 0: seed=0: succeeded>"


def test_the_table_has_a_row_per_job(sweep):
    found, told = sweep("sfq", axes=("loss", "seed"))
    table = found.to_dataframe()
    assert list(table.columns) == ["loss", "seed", *COLUMNS]
    assert (table.index.name, list(table.index)) == ("row", [0, 1, 2])
    assert list(table["status"]) == ["succeeded", "failed", "queued"]
    assert table["loss_value"][0] == 0.5
    assert table[["loss_value", "error"]].isna().to_numpy().tolist() == [[False, True], [True, False], [True, True]]
    assert table["error"][1] == "empty_batch: no samples"
    assert (table["queued_seconds"][0], table["running_seconds"][0]) == (1.0, 2.0)
    assert [query["results"] for name, query in told.asked if name == "rows"] == ["true"]


def test_a_coordinate_never_hides_a_column(sweep):
    found, _ = sweep("s", axes=("status",))
    table = found.to_dataframe()
    assert list(table.columns) == ["coordinates.status", *COLUMNS]
    assert (table["coordinates.status"][0], table["status"][0]) == (0, "succeeded")


def test_the_table_without_pandas_is_refused_with_what_to_do(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    found, _ = sweep("s")
    with pytest.raises(CurvatureError, match="needs pandas, which is not installed; pip install pandas") as caught:
        found.to_dataframe()
    assert caught.value.code == "not_installed"


def test_a_bar_shows_how_many_are_over_and_how_many_failed(sweep, capsys):
    found, _ = sweep("qqqq", "ffqs", "ffss")
    found._progress = True
    found.wait()
    shown = capsys.readouterr().err
    assert "3/4" in shown
    assert "2 failed" in shown


def test_an_empty_id_is_refused():
    with Client("http://127.0.0.1:9") as client, pytest.raises(CurvatureError, match="id is empty"):
        client.sweeps.get("")
