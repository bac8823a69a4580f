"""What operators set of tenants, and whether there is room in their queues."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier

import pytest
from sqlalchemy import event

from curvature_state import Database, jobs, keys, tenant_settings, tenants
from curvature_state.jobs import NewJob
from curvature_state.tables import JobRow
from curvature_state.tenants import QueueFull
from curvature_state.turns import Claimant, claim_next


def submit(database, tenant, count=1):
    return [jobs.create_job(database, NewJob({}, "d", tenant=tenant)).job for _ in range(count)]


def check_room(database, tenant, wanted=1):
    with database.write() as session:
        tenants.enter_queue(session, tenant, wanted)


def named(database, name):
    (found,) = [tenant for tenant in tenant_settings.list_tenants(database) if tenant.name == name]
    return found


def test_a_new_tenant_has_weight_one_and_no_limits(database):
    assert tenant_settings.set_tenant(database, "lab") is True
    found = named(database, "lab")
    assert (found.weight, found.max_queued, found.max_running, found.queued, found.running) == (1.0, None, None, 0, 0)


def test_settings_change_one_by_one(database):
    tenant_settings.set_tenant(database, "lab", weight=2.5, max_queued=100, max_running=3)
    assert tenant_settings.set_tenant(database, "lab", max_queued=None) is False
    found = named(database, "lab")
    assert (found.weight, found.max_queued, found.max_running) == (2.5, None, 3)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("", {}, "a tenant's name is made of"),
        ("a b", {}, "'a b'"),
        ("-a", {}, "'-a'"),
        ("a" * 65, {}, "up to 64"),
        ("lab", {"weight": 0}, "greater than 0"),
        ("lab", {"weight": float("nan")}, "got nan"),
        ("lab", {"weight": float("inf")}, "got inf"),
        ("lab", {"max_queued": -1}, "max_queued is a whole number from 0"),
        ("lab", {"max_running": 2**31}, "max_running"),
    ],
)
def test_what_is_no_name_and_no_setting_is_refused(database, name, settings, told):
    with pytest.raises(ValueError, match=told):
        tenant_settings.set_tenant(database, name, **settings)
    assert [tenant for tenant in tenant_settings.list_tenants(database) if tenant.name == name] == []


def test_queued_and_running_jobs_and_keys_are_counted(database):
    tenant_settings.set_tenant(database, "lab")
    submit(database, "lab", 3)
    claim_next(database, Claimant("w"), 30)
    submit(database, "other", 2)
    keys.create_key(database, "lab", "a")
    revoked, _ = keys.create_key(database, "lab", "b")
    keys.revoke_key(database, revoked.id)
    found = named(database, "lab")
    assert (found.queued, found.running, found.keys) == (2, 1, 1)


def test_there_is_room_up_to_the_limit(database):
    tenant_settings.set_tenant(database, "lab", max_queued=3)
    submit(database, "lab", 2)
    submit(database, "other", 5)
    check_room(database, "lab", 1)
    with pytest.raises(QueueFull) as caught:
        check_room(database, "lab", 2)
    error = caught.value
    assert (error.queued, error.wanted, error.limit) == (2, 2, 3)


def test_jobs_that_left_the_queue_make_room(database):
    tenant_settings.set_tenant(database, "lab", max_queued=1)
    submit(database, "lab")
    with pytest.raises(QueueFull):
        check_room(database, "lab")
    claim_next(database, Claimant("w"), 30)
    check_room(database, "lab")


def test_a_limit_of_none_at_all_shuts_the_queue(database):
    tenant_settings.set_tenant(database, "lab", max_queued=0)
    with pytest.raises(QueueFull):
        check_room(database, "lab")


def statements_of(database, call):
    seen = []

    def note(connection, cursor, statement, parameters, context, many):
        seen.append((statement, parameters))

    event.listen(database._engine, "before_cursor_execute", note)
    try:
        call()
    finally:
        event.remove(database._engine, "before_cursor_execute", note)
    return [(statement, parameters) for statement, parameters in seen if statement.startswith("SELECT")]


def test_without_a_limit_the_queue_is_not_counted(database):
    tenant_settings.set_tenant(database, "lab")
    submit(database, "lab", 3)
    asked = statements_of(database, lambda: check_room(database, "lab", 10**6))
    assert [statement for statement, _ in asked if "count(" in statement] == []


def test_the_queue_is_counted_by_its_index_and_no_further_than_the_limit(tmp_path, sqlite_template):
    path = tmp_path / "curvature.db"
    path.write_bytes(sqlite_template)
    database = Database(f"sqlite:///{path}")
    tenant_settings.set_tenant(database, "bounded", max_queued=2)
    asked = statements_of(database, lambda: check_room(database, "bounded"))
    ((statement, parameters),) = [asking for asking in asked if "count(" in asking[0]]
    with database.read() as session:
        connection = session.connection()
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    database.close()
    assert "jobs_by_turn (tenant=?)" in str(plan)
    assert "LIMIT" in statement
    assert 3 in parameters


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.integration)], indirect=True)
def test_two_submissions_at_once_do_not_share_the_last_place(database):
    """SQLite's writers take turns by themselves."""
    tenant_settings.set_tenant(database, "lab", max_queued=1)
    at_once = Barrier(4)

    def try_to_submit(number):
        now = datetime.now(UTC)
        row = JobRow(
            id=str(number), tenant="lab", status="queued", request={}, body_digest="d", rung_at=now, created_at=now
        )
        at_once.wait()
        try:
            with database.write() as session:
                tenants.enter_queue(session, "lab", 1)
                session.add(row)
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(try_to_submit, range(4))) == [False, False, False, True]


def test_a_tenant_is_made_once_by_whoever_comes_first(database):
    at_once = Barrier(4)

    def make(_):
        at_once.wait()
        return tenant_settings.set_tenant(database, "lab")

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(make, range(4))) == [False, False, False, True]
