"""What a worker is called, and what it offers."""

import socket

import pytest
from pydantic import ValidationError

from curvature_worker.settings import WorkerSettings


def test_a_worker_is_called_as_its_machine_unless_told_otherwise(monkeypatch):
    assert WorkerSettings().name == socket.gethostname()
    monkeypatch.setenv("CURVATURE_WORKER_NAME", "gpu-1")
    assert WorkerSettings().name == "gpu-1"


@pytest.mark.parametrize("name", ["", " ", "a" * 256, "two\nlines", "\x1b[31m"])
def test_a_name_that_cannot_be_shown_is_refused(name):
    with pytest.raises(ValidationError, match="a worker's name has 1 to 255 printable characters"):
        WorkerSettings(worker_name=name)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", ()),
        (",", ()),
        ("large", ("large",)),
        (" large , a100,large,", ("large", "a100")),
        ("a.b-c_1", ("a.b-c_1",)),
    ],
)
def test_tags_are_separated_by_commas(monkeypatch, text, tags):
    monkeypatch.setenv("CURVATURE_TAGS", text)
    assert WorkerSettings().tags == tags


def test_tags_given_in_the_program_are_a_list():
    assert WorkerSettings(tags=["large", "a100"]).tags == ("large", "a100")


@pytest.mark.parametrize("tag", ["two words", "-x", "a" * 65, "é"])
def test_what_is_no_tag_is_refused_by_its_name(tag):
    with pytest.raises(ValidationError, match="a tag is made of up to 64 letters"):
        WorkerSettings(tags=["large", tag])
