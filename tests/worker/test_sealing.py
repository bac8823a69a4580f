"""Files that nobody else can change."""

import errno
import fcntl
import os
import sys

import pytest

from curvature_worker.sealing import FileInUse, seal

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux")


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file"
    made.write_bytes(b"x" * 3_000_000)
    return made


def without_leases(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no leases here")

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@on_linux
def test_a_file_that_nobody_writes_stays_where_it_is(path):
    before = path.stat()
    seal(path)
    assert path.stat().st_ino == before.st_ino


@on_linux
def test_the_lease_is_given_back(path):
    seal(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.close(descriptor)


@on_linux
def test_a_file_open_for_reading_is_nobodys_business(path):
    with path.open("rb"):
        seal(path)


@on_linux
def test_a_file_open_for_writing_is_refused(path):
    with path.open("r+b"), pytest.raises(FileInUse, match="still open for writing"):
        seal(path)


def test_a_file_with_a_second_name_is_refused(path, tmp_path):
    (tmp_path / "other").hardlink_to(path)
    with pytest.raises(FileInUse, match="no regular file of its own"):
        seal(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "odd")
    with pytest.raises(FileInUse):
        seal(tmp_path / "odd")


def test_without_leases_it_becomes_a_copy(path, monkeypatch):
    before = path.read_bytes()
    without_leases(monkeypatch)
    with path.open("r+b") as writer:
        seal(path)
        writer.write(b"forged")
    assert path.read_bytes() == before
