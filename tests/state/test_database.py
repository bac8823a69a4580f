"""Transactions, migrations, readiness: SQLite and PostgreSQL."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError

from curvature_state import Database, jobs
from curvature_state.database import make_engine, migrate
from curvature_state.jobs import NewJob
from curvature_state.tables import Base

MOMENT = "2026-01-01 00:00:00.000000"


def test_the_migrations_make_exactly_the_tables_of_the_code(database_url):
    engine = make_engine(database_url)
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata) == []
    engine.dispose()


def test_migrating_twice_is_no_error(database_url):
    migrate(database_url)


def test_rows_of_the_first_version_are_analyses_that_were_never_handed_back(tmp_path):
    url = f"sqlite:///{tmp_path / 'old.db'}"
    migrate(url, "0001")
    engine = make_engine(url)
    columns = "id, tenant, status, priority, request, body_digest, attempt, rung_at, warnings, details, created_at"
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO jobs ({columns}) VALUES ('j', 't', 'queued', 5, '{{}}', 'd', 2, :t, '[]', '{{}}', :t)"),
            {"t": "2026-01-01 00:00:00"},
        )
    migrate(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT attempt, handed_back, kind FROM jobs")).one() == (2, 0, "analysis")
    engine.dispose()


def test_jobs_of_an_earlier_version_keep_their_uploads_and_results(tmp_path):
    url = f"sqlite:///{tmp_path / 'old.db'}"
    migrate(url, "0003")
    engine = make_engine(url)
    request = {
        "model": "a" * 64,
        "batch": {"sha256": "b" * 64},
        "loss": {"sha256": "c" * 64},
        "extensions": [{"name": "batch_dot", "options": {"against": {"sha256": "d" * 64}, "over": "model"}}],
    }
    rows = [("q", "queued", request, None), ("i", "queued", {"model": "a" * 64}, None), ("s", "succeeded", {}, MOMENT)]
    columns = "id, tenant, status, priority, request, body_digest, attempt, rung_at, warnings, details, created_at"
    with engine.begin() as connection:
        for job_id, state, asked, finished_at in rows:
            connection.execute(
                text(
                    f"INSERT INTO jobs ({columns}, finished_at) "
                    "VALUES (:id, 't', :state, 5, :request, 'd', 1, :t, '[]', '{}', :t, :finished)"
                ),
                {"id": job_id, "state": state, "request": json.dumps(asked), "t": MOMENT, "finished": finished_at},
            )
    migrate(url)
    with engine.connect() as connection:
        needs = connection.execute(text("SELECT job_id, kind, substr(sha256, 1, 1) FROM job_artefacts")).all()
        results = connection.execute(text("SELECT id, result_bytes, used_at FROM jobs ORDER BY id")).all()
    engine.dispose()
    named = {("q", "models", "a"), ("q", "batches", "b"), ("q", "losses", "c"), ("q", "batches", "d")}
    assert {tuple(row) for row in needs} == named | {("i", "models", "a")}
    assert [tuple(row) for row in results] == [("i", None, None), ("q", None, None), ("s", 0, MOMENT)]


def test_a_write_that_fails_leaves_nothing(database):
    def write_and_fail():
        with database.write() as session:
            session.execute(text("INSERT INTO alembic_version VALUES ('9999')"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM alembic_version")) == 1


def test_the_database_answers(database):
    database.ping()


def test_missing_tables_are_told_with_the_remedy(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with pytest.raises(RuntimeError, match="no tables yet; make them with `curvature admin migrate`"):
        database.ping()
    database.close()


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("0001", r"0001, not \d+; bring them up to date with `curvature admin migrate`"),
        ("9999", "9999, which is newer"),
    ],
)
def test_tables_of_another_version_are_told(database, version, remedy):
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})
    with pytest.raises(RuntimeError, match=remedy):
        database.ping()


def test_an_absent_database_raises_soon():
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(OperationalError):
        database.ping()
    database.close()


def test_sqlite_makes_the_folder_of_its_file(tmp_path):
    path = tmp_path / "new folder" / "a%20b?.db"
    migrate(URL.create("sqlite", database=str(path)).render_as_string())
    assert path.is_file()


def test_sqlite_writes_ahead(tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    engine.dispose()


@pytest.mark.integration
def test_two_servers_migrate_at_once(postgres):
    url = postgres.url(postgres.create_database())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: migrate(url), range(4)))
    database = Database(url)
    database.ping()
    database.close()


_CYCLES = """
import sys
from curvature_protocol.jobs import Progress
from curvature_state import Database, holding, jobs
from curvature_state.endings import succeed
from curvature_state.turns import Claimant, claim_next
database = Database(sys.argv[1])
for _ in range(25):
    jobs.create_job(database, jobs.NewJob({}, "d"))
    held = claim_next(database, Claimant("w"), 30)
    assert holding.renew(database, held.id, held.attempt, 30, Progress(phase="computing"))
    assert succeed(database, held.id, held.attempt)
database.close()
"""


@pytest.mark.integration
def test_many_processes_write_without_an_error(database_url):
    """On SQLite, a deferred transaction that reads and then writes fails here with "database is locked"."""
    command = [sys.executable, "-c", _CYCLES, database_url]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 4
    database = Database(database_url)
    assert len(jobs.list_jobs(database, tenant="default", status=None, limit=1000, before=None)) == 100
    database.close()


def test_text_that_databases_dislike_is_kept(database):
    request = {"metadata": {"a": "nul \x00 and 🙂"}}
    job = jobs.create_job(database, NewJob(request, "d")).job
    assert jobs.get_job(database, job.id).request == request
