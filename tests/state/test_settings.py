"""Settings come from the environment; URLs are spelled as each library wants them."""

import pytest

from curvature_state import StateSettings
from curvature_state.database import make_engine


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("CURVATURE_DATABASE_URL", "sqlite:///elsewhere.db")
    assert StateSettings().database_url == "sqlite:///elsewhere.db"


@pytest.mark.parametrize(
    ("redis_url", "broker_url"),
    [
        ("redis://:secret@redis:6379/1", "redis://:secret@redis:6379/1"),
        ("unix:///run/a%20b/x.sock?db=2", "redis+socket:///run/a%20b/x.sock?virtual_host=2"),
        ("unix:///run/x.sock", "redis+socket:///run/x.sock?virtual_host=0"),
    ],
)
def test_celery_spells_unix_sockets_in_its_own_way(redis_url, broker_url):
    assert StateSettings(redis_url=redis_url).broker_url == broker_url


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_postgresql_is_reached_through_psycopg(scheme):
    assert make_engine(f"{scheme}://user@host/name").dialect.driver == "psycopg"
