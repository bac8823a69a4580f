"""API keys: made, found by their digest, noted as used, revoked."""

import hashlib
import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text

from curvature_state import keys, tenant_settings
from curvature_state.tables import ApiKeyRow


def move_use(database, key, used_at):
    with database.write() as session:
        session.get(ApiKeyRow, key.id).used_at = used_at


def test_a_key_is_found_again(database):
    made, key = keys.create_key(database, "lab", "laptop of Ana")
    assert re.fullmatch(rf"cv_{made.id}_[0-9a-f]{{48}}", key)
    assert keys.find_key(database, key) == made
    assert (made.tenant, made.name, made.used_at, made.revoked_at) == ("lab", "laptop of Ana", None, None)


def test_no_two_keys_are_alike(database):
    made = [keys.create_key(database, "lab", "same")[1] for _ in range(5)]
    assert len(set(made)) == 5


def test_only_the_digest_is_kept(database):
    _, key = keys.create_key(database, "lab", "a")
    with database.read() as session:
        row = session.execute(select(ApiKeyRow.__table__)).one()
    assert row.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert key.rpartition("_")[2] not in str(row)


def test_making_a_key_makes_the_tenant(database):
    keys.create_key(database, "lab", "a")
    assert "lab" in [tenant.name for tenant in tenant_settings.list_tenants(database)]


@pytest.mark.parametrize("name", ["", "a" * 256, "two\nlines", "\x1b[31m"])
def test_a_name_that_cannot_be_shown_is_refused(database, name):
    with pytest.raises(ValueError, match="a key's name has 1 to 255 printable characters"):
        keys.create_key(database, "lab", name)


def test_a_tenant_that_is_no_name_is_refused(database):
    with pytest.raises(ValueError, match="a tenant's name"):
        keys.create_key(database, "a/b", "a")


def test_other_texts_are_no_keys(database):
    _, key = keys.create_key(database, "lab", "a")
    last = "0" if key[-1] != "0" else "1"
    for other in ("", "cv_", key[:-1] + last, key + "0", key.upper(), f"{key}\n", "nul \x00", key[:-1] + "é"):
        assert keys.find_key(database, other) is None


def test_keys_are_listed_oldest_first_and_by_tenant(database):
    made = [keys.create_key(database, tenant, "k")[0] for tenant in ("a", "b", "a")]
    assert keys.list_keys(database) == made
    assert keys.list_keys(database, "a") == [made[0], made[2]]
    assert keys.list_keys(database, "c") == []


def test_a_revoked_key_is_found_as_revoked_and_stays_so(database):
    made, key = keys.create_key(database, "lab", "a")
    revoked = keys.revoke_key(database, made.id)
    assert revoked.revoked_at is not None
    assert keys.find_key(database, key) == revoked
    assert keys.revoke_key(database, made.id) == revoked
    assert keys.list_keys(database) == [revoked]


def test_a_key_is_revoked_by_its_beginning_or_by_itself(database):
    (one, _), (two, key) = (keys.create_key(database, "lab", "a") for _ in range(2))
    assert keys.revoke_key(database, f"cv_{one.id}").id == one.id
    assert keys.revoke_key(database, key).id == two.id


def test_revoking_one_leaves_the_others(database):
    (one, _), (_, other) = (keys.create_key(database, "lab", "a") for _ in range(2))
    keys.revoke_key(database, one.id)
    assert keys.find_key(database, other).revoked_at is None


def test_no_key_is_revoked_under_an_unknown_id(database):
    made, _ = keys.create_key(database, "lab", "a")
    assert [keys.revoke_key(database, unknown) for unknown in ("", "cv_", "cv_000000000000", made.id[:6])] == [None] * 4
    assert keys.list_keys(database) == [made]


def test_use_is_noted_at_most_once_a_minute(database):
    made, key = keys.create_key(database, "lab", "a")
    keys.touch_key(database, made)
    noted = keys.find_key(database, key)
    assert datetime.now(UTC) - noted.used_at < timedelta(seconds=30)
    keys.touch_key(database, noted)
    keys.touch_key(database, made)  # whoever read the record earlier
    assert keys.find_key(database, key) == noted
    move_use(database, made, datetime.now(UTC) - timedelta(seconds=61))
    keys.touch_key(database, keys.find_key(database, key))
    assert datetime.now(UTC) - keys.find_key(database, key).used_at < timedelta(seconds=30)


def test_use_noted_just_now_writes_nothing(database, database_url):
    made, key = keys.create_key(database, "lab", "a")
    keys.touch_key(database, made)
    noted = keys.find_key(database, key)
    with database.write() as session:  # nobody else can write on SQLite now; here nobody tries
        session.execute(text("UPDATE api_keys SET name = 'b'"))
        keys.touch_key(database, noted)


def test_the_public_beginning_holds_no_secret(database):
    made, key = keys.create_key(database, "lab", "a")
    assert keys.public_beginning(key) == f"cv_{made.id}"
    assert keys.public_beginning("secret") is None
