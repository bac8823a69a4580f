"""`curvature admin` on a real database: as a shell runs it, and, where the shell does not matter, in this process."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from tests.service.server import LiveServer, settings_in
from typer.testing import CliRunner

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_service.admin.command import app
from curvature_service.authentication import KnownKeys
from curvature_state import Database, jobs, keys, migrate, workers
from curvature_state.jobs import NewJob
from curvature_state.turns import Claimant, claim_next

pytestmark = pytest.mark.integration

CURVATURE = str(Path(sys.executable).with_name("curvature"))


def run_process(*words, url, **settings):
    """What a shell runs."""
    environment = {**os.environ, "CURVATURE_DATABASE_URL": url, **settings}
    return subprocess.run([CURVATURE, *words], env=environment, capture_output=True, text=True, timeout=60, check=False)


def run(*words, url, **settings):
    """The same command in this process; an exception is none that it told."""
    result = CliRunner().invoke(app, words, env={"CURVATURE_DATABASE_URL": url, **settings})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def url(tmp_path, sqlite_template):
    (tmp_path / "curvature.db").write_bytes(sqlite_template)
    return f"sqlite:///{tmp_path / 'curvature.db'}"


@pytest.fixture
def database(url):
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def admin(url):
    """Runs a command that must succeed; returns what it printed."""

    def succeed(*words):
        done = run(*words, url=url)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    return succeed


@pytest.fixture
def refused(url):
    """Runs a command that must fail with one line; returns that line."""

    def fail(*words, url=url, **settings):
        done = run(*words, url=url, **settings)
        assert done.exit_code == 1, done.output
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("curvature admin: ")
        return line

    return fail


def publish(database, name="gpu-1", worker_id="host-1", **fields):
    view = WorkerView(
        id=worker_id, name=name, device="cpu", engine_version="1", isolation="none", seen_at=datetime.now(UTC), **fields
    )
    workers.publish_worker(database, view, Catalogue(engine_version="1", extensions=(), losses=()))


def rows(printed):
    """Columns are two spaces or more apart."""
    return [re.split(r" {2,}", line) for line in printed.splitlines()]


# Tables


def test_migrate_makes_the_tables_once(tmp_path):
    url = f"sqlite:///{tmp_path / 'new' / 'curvature.db'}"
    first, second = (run_process("admin", "migrate", url=url) for _ in range(2))
    assert re.fullmatch(r"made the tables \(version \d+\)\n", first.stdout)
    assert re.fullmatch(r"the tables are up to date \(version \d+\)\n", second.stdout)
    database = Database(url)
    database.ping()
    database.close()


def test_tables_of_an_earlier_version_are_told_and_migrated(tmp_path, refused):
    old = f"sqlite:///{tmp_path / 'old.db'}"
    migrate(old, "0001")
    line = refused("keys", "list", url=old)
    assert "of version 0001" in line
    assert "curvature admin migrate" in line
    assert re.fullmatch(r"version 0001 → \d+\n", run("migrate", url=old).stdout)
    assert run("keys", "list", url=old).exit_code == 0


@pytest.mark.parametrize("words", [["workers"], ["migrate"]])
def test_tables_of_a_later_version_are_told(database, refused, words):
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert "of version 9999, which is newer" in refused(*words)


# Keys


def test_a_key_that_was_created_opens_and_a_revoked_one_does_not(tmp_path, redis_server, sqlite_template):
    settings = settings_in(tmp_path, redis_server, sqlite_template, require_key=True)
    with LiveServer(settings) as server:
        made = run_process("admin", "keys", "create", "--tenant", "lab", "--name", "ci", url=settings.database_url)
        key = made.stdout.removesuffix("\n")
        beginning = key.rpartition("_")[0]
        assert beginning in made.stderr
        assert key not in made.stderr

        def status():
            with httpx.Client(base_url=server.url, trust_env=False) as client:
                return client.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status() == 200
        told = run_process("admin", "keys", "revoke", beginning, url=settings.database_url).stdout
        assert f"{beginning} (ci, tenant lab) is revoked" in told
        server.app.state.keys = KnownKeys(server.resources.database)  # as some seconds later
        assert status() == 401


def test_keys_are_listed_without_their_secrets(admin, database):
    (one, key), (two, _) = (keys.create_key(database, tenant, "[red]x[/red]") for tenant in ("lab", "other"))
    keys.touch_key(database, one)
    keys.revoke_key(database, two.id)
    head, first, second = rows(admin("keys", "list"))
    assert head == ["KEY", "TENANT", "NAME", "CREATED", "USED", "STATE"]
    assert first[:3] == [f"cv_{one.id}", "lab", "[red]x[/red]"]
    assert re.fullmatch(r"\d+ s ago", first[4])
    assert (first[5], second[4]) == ("valid", "never")
    assert re.fullmatch(r"revoked \d+ s ago", second[5])
    listed = admin("keys", "list", "--tenant", "lab")
    assert len(listed.splitlines()) == 2
    assert key.rpartition("_")[2] not in listed


def test_an_unknown_key_is_told(refused):
    assert "there is no key 'cv_000000000000'; `curvature admin keys list`" in refused(
        "keys", "revoke", "cv_000000000000"
    )


def test_a_tenant_that_is_no_name_is_told(refused):
    assert "got 'two words'" in refused("keys", "create", "--tenant", "two words", "--name", "x")


# Tenants


def test_tenants_are_set_and_listed(admin, database):
    assert admin("tenants", "set", "lab", "--weight", "2.5", "--max-queued", "10000") == (
        "new tenant lab: weight 2.5, queued jobs at most 10,000, running jobs without limit\n"
    )
    assert "weight 2.5, queued jobs without limit, running jobs at most 3" in admin(
        "tenants", "set", "lab", "--max-queued", "none", "--max-running", "3"
    )
    for _ in range(2):
        jobs.create_job(database, NewJob({}, "d", tenant="lab"))
    claim_next(database, Claimant("w"), 60)
    assert rows(admin("tenants", "list")) == [
        ["TENANT", "WEIGHT", "QUEUED", "RUNNING", "KEYS"],
        ["lab", "2.5", "1", "1 of 3", "0"],
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to set"),
        (["--weight", "0"], "a weight is greater than 0"),
        (["--max-queued", "few"], "--max-queued takes a whole number, or none; got 'few'"),
        (["--max-running", "-1"], "--max-running takes a whole number, or none; got '-1'"),
        (["--max-running", "99999999999"], "max_running is a whole number from 0 to"),
    ],
)
def test_settings_that_do_not_fit_are_told(refused, words, told):
    assert told in refused("tenants", "set", "lab", *words)


# Workers


def test_workers_are_listed_with_what_they_do(admin, database):
    publish(database, memory_bytes=24 * 2**30, tags=("large", "a100"))
    publish(database, "cpu", "host-2")
    publish(database, "gone", "host-3")
    publish(database, "cpu", "host-4")
    workers.remove_worker(database, "host-3")
    job = jobs.create_job(database, NewJob({}, "d")).job
    claim_next(database, Claimant("host-2"), 60)
    workers.set_draining(database, "cpu", True)
    assert [row[:-1] for row in rows(admin("workers"))] == [
        ["NAME", "ID", "DEVICE", "MEMORY", "TAGS", "STATE"],
        ["gpu-1", "host-1", "cpu", "24 GiB", "large, a100", "idle"],
        ["cpu", "host-2", "cpu", "-", "-", f"draining ({job.id})"],
        ["cpu", "host-4", "cpu", "-", "-", "drained"],
    ]


def test_draining_by_name_and_id_and_back(admin, database):
    publish(database, "gpu-1", "host-1")
    publish(database, "gpu-1", "host-2")
    jobs.create_job(database, NewJob({}, "d"))
    held = claim_next(database, Claimant("host-2"), 60)
    assert admin("drain", "gpu-1").splitlines() == [
        "gpu-1 (host-1): idle; hears of it within 5 s, and takes no more jobs then",
        f"gpu-1 (host-2): finishes job {held.id}, then takes no other",
    ]
    assert admin("drain", "host-1", "--undo") == "gpu-1 (host-1): takes jobs again\n"
    assert [w.draining for w in workers.list_workers(database)] == [False, True]


def test_a_worker_that_does_not_run_is_told_with_those_that_do(database, refused):
    assert refused("drain", "gpu-2").endswith("the name or id 'gpu-2'; none runs")
    publish(database, "gpu-1", "host-1")
    assert refused("drain", "gpu-2").endswith("the name or id 'gpu-2'; those that run: gpu-1")


# What goes wrong before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("postgresql://nobody:secret@127.0.0.1:1/none", "the database does not answer"),
        ("nonsense", "CURVATURE_DATABASE_URL is no address of a database"),
        ("postgresql://host:port/x", "CURVATURE_DATABASE_URL is no address of a database"),
        ("sqlite:////no/such/curvature.db", "there is no database /no/such/curvature.db"),
    ],
)
def test_a_database_that_is_away_is_told_in_a_line(refused, wrong, told):
    line = refused("workers", url=wrong)
    assert told in line
    assert "secret" not in line


def test_a_shell_sees_one_line_and_no_traceback():
    done = run_process("admin", "workers", url="postgresql://nobody:secret@127.0.0.1:1/none")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("curvature admin: the database does not answer: connection failed")


def test_looking_at_a_database_that_is_not_there_makes_none(tmp_path, refused):
    assert "curvature admin migrate" in refused("keys", "list", url=f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_no_database_is_told(tmp_path, refused):
    (tmp_path / "text.db").write_text("a text that is long enough to be looked at as a database's head, " * 20)
    assert "file is not a database" in refused("workers", url=f"sqlite:///{tmp_path / 'text.db'}")


def test_settings_of_the_environment_that_do_not_fit_are_told(refused):
    assert "CURVATURE_LEASE_SECONDS: " in refused("workers", CURVATURE_LEASE_SECONDS="long")


def test_the_help_shows_the_commands_of_the_group(url):
    done = run_process("admin", "-h", url=url)
    assert done.returncode == 0
    for command in ("migrate", "keys", "tenants", "workers", "drain"):
        assert re.search(rf"^│? *{command} ", done.stdout, re.MULTILINE)
    assert re.search(r"^│? *admin ", run_process("-h", url=url).stdout, re.MULTILINE)
